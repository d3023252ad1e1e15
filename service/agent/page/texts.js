// Every text of the page in both languages, and which of them is chosen. Reasons and warnings stay as the agent says them.

const TEXTS = {
  en: {
    locale: "en",
    now: "Now",
    hosts: "Hosts and GPUs",
    changes: "Last changes",
    "no changes": "None yet.",
    "as json": "The same as JSON",
    "as of": "as of {time}",
    "all services": "All services",
    "slots in use": "Slots in use",
    "slots ready": "Slots ready",
    "instances ready": "Instances ready",
    waiting: "Waiting",
    served: "Served",
    refused: "Refused",
    failed: "Failed",
    version: "Version",
    since: "Since",
    gpu: "GPU {number}",
    "of": "{count} of {total}",
    "state ready": "ready",
    "state loading": "loading",
    "state suspect": "taken out",
    "state recycling": "recycling",
    "state stopping": "stopping",
    "state failed": "failed",
    "state draining": "draining",
    "state drained": "drained",
    "state down": "down",
    "drained by operator": "Drained by an operator, {since}",
    "drained by rollout": "Drained by a rollout, {since}",
    "drained by null": "Drained by hand",
    because: "{what}: {reason}",
    "cluster healthy": "healthy",
    "cluster degraded": "degraded",
    "cluster down": "down",
    "change drain": "drained",
    "change undrain": "serves again",
    "change forget the drain": "drain forgotten, it left the fleet",
    "change rollout": "rolled out: {from} → {to}",
    "change rollback": "rolled back: {from} → {to}",
    "change restart": "restarted",
    "change add": "added",
    "change start": "started again",
    "change configure": "new configuration: {from} → {to}",
    "change without success": "{what}: not successful",
    nothing: "nothing",
    "news one": "{name}: {state}",
    "between news": "; ",
    "news many": "{count} GPUs changed their state",
    "news fresh": "The figures are fresh again",
    "why silence": "Nothing new arrives from the gateway.",
    "why unreachable": "The gateway cannot be reached.",
    "why agent_not_answering": "The agent does not answer. Requests are served on without it.",
    "why forbidden": "This page is not for your address.",
    "age": "These figures are {seconds} s old; trying again.",
    "no age": "No figures yet; trying again.",
  },
  zh: {
    locale: "zh-CN",
    now: "当前状态",
    hosts: "主机与 GPU",
    changes: "最近变更",
    "no changes": "暂无。",
    "as json": "JSON 格式",
    "as of": "更新于 {time}",
    "all services": "全部服务",
    "slots in use": "占用槽位",
    "slots ready": "就绪槽位",
    "instances ready": "就绪实例",
    waiting: "排队",
    served: "已完成",
    refused: "已拒绝",
    failed: "失败",
    version: "版本",
    since: "始于",
    gpu: "GPU {number}",
    "of": "{count} / {total}",
    "state ready": "就绪",
    "state loading": "加载中",
    "state suspect": "已摘除",
    "state recycling": "回收中",
    "state stopping": "停止中",
    "state failed": "失败",
    "state draining": "摘流中",
    "state drained": "已摘流",
    "state down": "离线",
    "drained by operator": "操作员摘流，{since}",
    "drained by rollout": "发布时摘流，{since}",
    "drained by null": "手工摘流",
    because: "{what}：{reason}",
    "cluster healthy": "健康",
    "cluster degraded": "降级",
    "cluster down": "不可用",
    "change drain": "摘流",
    "change undrain": "恢复服务",
    "change forget the drain": "已离开集群，摘流标记已清除",
    "change rollout": "发布：{from} → {to}",
    "change rollback": "回滚：{from} → {to}",
    "change restart": "重启",
    "change add": "加入集群",
    "change start": "重新启动",
    "change configure": "新配置：{from} → {to}",
    "change without success": "{what}（未成功）",
    nothing: "无",
    "news one": "{name}：{state}",
    "between news": "；",
    "news many": "{count} 张 GPU 的状态有变化",
    "news fresh": "数据已恢复更新",
    "why silence": "网关没有送来新数据。",
    "why unreachable": "无法连接网关。",
    "why agent_not_answering": "状态代理未应答；请求照常处理。",
    "why forbidden": "你的地址无权查看本页。",
    "age": "数据已有 {seconds} 秒未更新，正在重试。",
    "no age": "尚无数据，正在重试。",
  },
};

const KEPT = "gpufleet-language";

export let language = kept() ?? navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag in TEXTS) ?? "en";

// Speak this language from now on, and here the next time too.
export function speak(chosen) {
  language = chosen;
  try {
    localStorage.setItem(KEPT, chosen);
  } catch {
    // A browser that keeps nothing is asked again the next time.
  }
}

// A text with its {values}; undefined where there is none of this name.
export function text(name, values = {}) {
  return TEXTS[language][name]?.replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

export function count(number) {
  return new Intl.NumberFormat(text("locale")).format(number);
}

export function clock(iso) {
  return new Intl.DateTimeFormat(text("locale"), { timeStyle: "medium" }).format(new Date(iso));
}

// The time of a moment of today, else also its date.
export function moment(iso) {
  const when = new Date(iso);
  const today = when.toDateString() === new Date().toDateString();
  const style = { dateStyle: today ? undefined : "short", timeStyle: "short" };
  return new Intl.DateTimeFormat(text("locale"), style).format(when);
}

function kept() {
  try {
    const found = localStorage.getItem(KEPT);
    return found in TEXTS ? found : null;
  } catch {
    return null;
  }
}
