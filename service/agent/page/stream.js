// What the agent tells, as a stream; while there is none to be had, the document is asked for now and then.

const OLD_AFTER = 6_000; // milliseconds without a word, of which the agent says one a second
const RETRY_AFTER = [1_000, 2_000, 4_000];

// Call told(fleet) with each new state of the cluster. Call aged(why, seconds) once a second while nothing new comes,
// and aged(null) while it does: why is the name of a reason; seconds is null before the first word.
export function follow(told, aged) {
  let fleet = null;
  let heard = null; // when the fleet was told last, by performance.now()
  let stream = null;
  let opened = 0;
  let timer = 0;
  let failures = 0;
  let why = null;

  function take(next) {
    fleet = next;
    heard = performance.now();
    why = null;
    told(fleet);
    aged(null);
  }

  function open() {
    opened = performance.now();
    stream = new EventSource("events");
    stream.addEventListener("whole", (event) => {
      failures = 0;
      take(JSON.parse(event.data));
    });
    stream.addEventListener("change", (event) => take(changed(fleet, JSON.parse(event.data))));
    stream.addEventListener("error", retry);
  }

  function close() {
    clearTimeout(timer);
    stream?.close();
    stream = null;
  }

  // Also how each stream ends after a minute. Not left to the browser, which gives up where the answer is an error.
  async function retry() {
    close();
    const patience = RETRY_AFTER[Math.min(failures++, RETRY_AFTER.length - 1)];
    timer = setTimeout(open, patience * (0.75 + Math.random() / 2));
    const before = heard;
    const said = await ask();
    if (heard !== before || document.hidden) return; // the next stream was faster, or nobody looks
    if (said.instances) take(said);
    else why = said.error?.code ?? "unreachable";
    tick();
  }

  async function ask() {
    try {
      const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(4_000) });
      return await answer.json();
    } catch {
      return { error: { code: "unreachable" } };
    }
  }

  function tick() {
    if (document.hidden) return;
    const silent = performance.now() - Math.max(heard ?? 0, opened) > OLD_AFTER;
    if (silent && stream) retry();
    const seconds = heard === null ? null : Math.round((performance.now() - heard) / 1_000);
    if (why || silent) aged(why ?? "silence", seconds);
  }

  // A tab that nobody looks at costs the agent nothing, and takes none of the few connections of its browser.
  document.addEventListener("visibilitychange", () => {
    close();
    if (!document.hidden) open();
  });
  setInterval(tick, 1_000);
  if (!document.hidden) open();
}

function changed(fleet, change) {
  const entries = new Map(change.instances.map((entry) => [entry.id, entry]));
  return { ...fleet, ...change, instances: fleet.instances.map((entry) => entries.get(entry.id) ?? entry) };
}
