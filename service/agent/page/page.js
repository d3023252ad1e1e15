// Draws the cluster as the agent tells it. What it says goes in as text, never as markup.

import { follow } from "./stream.js";
import { clock, count, language, moment, speak, text } from "./texts.js";

const MANY = 24; // slots that are drawn without gaps
const NEWS_AT_ONCE = 3;

const $ = (id) => document.getElementById(id);

let fleet = null; // as it was told last
let trouble = { why: null, seconds: null };
const gpus = new Map(); // by instance: its node, and the entry that it shows
const sums = new Map(); // by service, null for all: its node

function copy(template) {
  const node = $(template).content.firstElementChild.cloneNode(true);
  translate(node);
  return node;
}

function translate(node) {
  for (const part of node.querySelectorAll("[data-text]")) write(part, text(part.dataset.text));
}

// An element is touched only where it changes: else selections and screen readers would lose their place.
function write(node, words) {
  if (node.textContent !== words) node.textContent = words;
}

function fill(node, parts) {
  for (const [name, words] of Object.entries(parts)) {
    const part = node.querySelector(`[data-is="${name}"]`);
    write(part, words ?? "");
    (part.closest("dl > div") ?? part).hidden = !words;
  }
}

function fillSlots(node, label, taken, total) {
  const [meter, figures] = node.children;
  node.hidden = !total;
  write(figures, `${taken} / ${total}`);
  while (meter.childElementCount > total) meter.lastElementChild.remove();
  while (meter.childElementCount < total) meter.append(document.createElement("i"));
  meter.classList.toggle("many", total > MANY);
  [...meter.children].forEach((slot, number) => slot.classList.toggle("taken", number < taken));
  meter.ariaLabel = label;
  meter.ariaValueMax = total;
  meter.ariaValueNow = Math.min(taken, total);
  meter.ariaValueText = text("of", { count: taken, total });
}

function state(node, name, kind) {
  node.dataset.state = name;
  write(node, text(`${kind} ${name}`) ?? name);
}

function figure(number) {
  return number === null ? null : count(number);
}

function layOut() {
  gpus.clear();
  $("hosts").replaceChildren();
  let host = null;
  let list = null;
  const byHost = (one, other) => (one.host < other.host ? -1 : one.host > other.host ? 1 : one.gpu - other.gpu);
  for (const entry of fleet.instances.toSorted(byHost)) {
    if (entry.host !== host) {
      host = entry.host;
      const section = copy("host");
      fill(section, { host, address: entry.address });
      list = section.querySelector("ul");
      $("hosts").append(section);
    }
    const node = copy("gpu");
    node.dataset.instance = entry.id;
    list.append(node);
    gpus.set(entry.id, { node, entry: null });
  }
}

function drawGpu(gpu, entry) {
  if (gpu.entry === entry) return;
  gpu.entry = entry;
  fill(gpu.node, {
    name: text("gpu", { number: entry.gpu }),
    service: entry.service,
    served: figure(entry.served),
    refused: figure(entry.refused),
    failed: figure(entry.failed),
    version: entry.version,
    since: entry.since && moment(entry.since),
    reason: entry.reason ?? entry.warning,
    drain: entry.drain && drainOf(entry.drain),
  });
  state(gpu.node.querySelector(".state"), entry.state, "state");
  const [slots, places] = gpu.node.querySelectorAll(".slots");
  fillSlots(slots, text("slots in use"), entry.in_flight ?? 0, entry.slots);
  fillSlots(places, text("waiting"), entry.waiting ?? 0, entry.queue ?? 0);
}

function drainOf({ by, since, reason }) {
  const what = text(`drained by ${by}`, { since: since && moment(since) });
  return reason ? text("because", { what, reason }) : what;
}

function drawSums() {
  const services = Object.keys(fleet.services);
  const wanted = services.length > 1 ? [null, ...services] : [null];
  if (JSON.stringify(wanted) !== JSON.stringify([...sums.keys()])) {
    for (const node of sums.values()) node.remove();
    sums.clear();
    for (const name of wanted) {
      sums.set(name, copy("sum"));
      $("sums").append(sums.get(name));
    }
  }
  for (const [name, node] of sums) {
    const sum = name === null ? fleet.totals : fleet.services[name];
    write(node.querySelector("h3"), name ?? (services.length > 1 ? text("all services") : services[0]));
    fill(node, {
      slots: `${count(sum.in_flight)} / ${count(sum.total_capacity)}`,
      available: `${count(sum.available_capacity)} / ${count(sum.total_capacity)}`,
      ready: `${count(sum.ready)} / ${count(sum.instances)}`,
      waiting: sum.queue || sum.waiting ? `${count(sum.waiting)} / ${count(sum.queue)}` : null,
      served: count(sum.served),
      refused: count(sum.refused),
      failed: count(sum.failed),
    });
  }
}

function drawChanges() {
  const lines = fleet.changes.map((change) => {
    const line = copy("change");
    const values = { from: change.from ?? text("nothing"), to: change.to ?? text("nothing") };
    const what = text(`change ${change.what}`, values) ?? change.what;
    fill(line, {
      time: moment(change.time),
      instance: change.instance,
      what: change.ok ? what : text("change without success", { what }),
    });
    line.querySelector("time").dateTime = change.time;
    return line;
  });
  $("changes").replaceChildren(...lines);
  $("no-changes").hidden = lines.length > 0;
}

function draw(before) {
  if (before?.instances.length !== fleet.instances.length || !fleet.instances.every(({ id }) => gpus.has(id))) layOut();
  for (const entry of fleet.instances) drawGpu(gpus.get(entry.id), entry);
  drawSums();
  if (before?.changes !== fleet.changes) drawChanges();
  write($("cluster"), fleet.cluster);
  document.title = fleet.cluster;
  state($("health"), fleet.status, "cluster");
  write($("as-of"), text("as of", { time: clock(fleet.timestamp) }));
  write($("warning"), fleet.warning ?? "");
  $("warning").hidden = !fleet.warning;
  $("main").hidden = false;
}

function drawTrouble() {
  const { why, seconds } = trouble;
  document.body.classList.toggle("old", why !== null);
  $("trouble").hidden = why === null;
  write($("why"), why === null ? "" : (text(`why ${why}`) ?? why));
  write($("age"), why === null ? "" : text(seconds === null ? "no age" : "age", { seconds }));
}

// For screen readers: what changed its state, and no figures.
function tellNews(before) {
  const known = new Map(before.instances.map((entry) => [entry.id, entry.state]));
  const news = fleet.instances.filter((entry) => known.has(entry.id) && known.get(entry.id) !== entry.state);
  if (news.length > NEWS_AT_ONCE) write($("news"), text("news many", { count: news.length }));
  else if (news.length) write($("news"), news.map(oneNews).join(text("between news")));
}

function oneNews(entry) {
  const name = `${entry.host} ${text("gpu", { number: entry.gpu })}`;
  return text("news one", { name, state: text(`state ${entry.state}`) ?? entry.state });
}

function told(next) {
  const before = fleet;
  fleet = next;
  draw(before);
  if (before) tellNews(before);
}

function aged(why, seconds = null) {
  if (trouble.why !== null && why === null) write($("news"), text("news fresh"));
  trouble = { why, seconds };
  drawTrouble();
}

function useLanguage() {
  document.documentElement.lang = text("locale");
  for (const button of $("languages").children) button.ariaPressed = String(button.dataset.language === language);
  translate(document);
  drawTrouble();
  if (fleet) {
    for (const gpu of gpus.values()) gpu.entry = null; // has every card drawn anew
    drawChanges();
    draw(fleet);
  }
}

$("languages").addEventListener("click", ({ target }) => {
  if (!(target instanceof HTMLButtonElement)) return;
  speak(target.dataset.language);
  useLanguage();
});
useLanguage();
follow(told, aged);
