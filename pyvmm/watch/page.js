"use strict";
/* SPDX-License-Identifier: MIT */
/*
 * Draws what pyvmm watch tells of a machine. Each answer is asked for when the one before has been
 * drawn, and only while the page is in sight; the server answers once per interval. Text becomes
 * text nodes and nothing else: it may come from a hostile guest.
 */
const SVG = "http://www.w3.org/2000/svg";
const KEPT = 120; /* looks in a curve */
const FAILURES = 3; /* in a row, before the page takes the server for gone */
const RETRY_MS = 2000;
const ROWS = 14; /* causes of exits */

const $ = (id) => document.getElementById(id);

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return (value / 1e6).toFixed(value >= 1e7 ? 0 : 1) + " M";
  if (value >= 1e4) return (value / 1e3).toFixed(value >= 1e5 ? 0 : 1) + " k";
  return value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1);
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
const add = (values) => {
  const known = values.filter((v) => v !== null && v !== undefined);
  return known.length ? known.reduce((sum, v) => sum + v, 0) : null;
};

/* Set a text, and touch the document only if it has changed. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

let history = [], events = [], last = 0, latest = null;

/* A number and its curve. */
class Tile {
  constructor(label, pick, why) {
    this.pick = pick;
    this.label = label;
    this.value = el("b", {}, "–");
    this.svg = draw("svg", { viewBox: "0 0 120 30", preserveAspectRatio: "none", role: "img" });
    this.root = el("div", { class: "tile" }, this.value, el("span", {}, label), this.svg);
    if (why) this.root.title = why;
  }

  update(rates) {
    const now = rates ? this.pick(rates) : null;
    put(this.value, number(now));
    const end = last, x = (n) => 120 - (end - n) * (120 / KEPT);
    const points = history.map((h) => [h.number, h.time, this.pick(h)]);
    const top = Math.max(1, ...points.map((p) => p[2] || 0));
    let path = "", before = null;
    for (const [at, time, value] of points) {
      if (value === null || value === undefined) { before = null; continue; }
      const gap = before === null || time - before > 3 * (latest ? latest.interval : 1) + 1;
      path += `${gap ? "M" : "L"}${x(at).toFixed(1)} ${(28 - 25 * value / top).toFixed(1)}`;
      before = time;
    }
    const nodes = [draw("line", { class: "base", x1: 0, x2: 120, y1: 28.5, y2: 28.5 })];
    for (const event of events)
      if (MARKED.has(event.kind) && end - event.number < KEPT)
        nodes.push(draw("line", { class: "mark", x1: x(event.number + 1), x2: x(event.number + 1),
          y1: 0, y2: 30 }));
    if (path) nodes.push(draw("path", { class: "curve", d: path }));
    this.svg.replaceChildren(...nodes);
    this.svg.setAttribute("aria-label",
      `${this.label}, of the last ${history.length} looks, at most ${number(top)}`);
  }
}
const MARKED = new Set(["switch", "reset", "stop", "resume", "driver", "x_pyvmm_nic_fault"]);

/* --- a virtqueue --- */

const R = 92, CENTRE = 120;
const turn = (part) => [CENTRE + R * Math.sin(2 * Math.PI * part),
  CENTRE - R * Math.cos(2 * Math.PI * part)];

/* An arc on a circle of radius r: entries start to start + many of size. */
function arc(kind, r, start, many, size, width) {
  if (many >= size)
    return draw("circle", { class: kind, cx: CENTRE, cy: CENTRE, r, "stroke-width": width });
  const point = (at) => {
    const angle = 2 * Math.PI * at / size;
    return `${(CENTRE + r * Math.sin(angle)).toFixed(2)} ${(CENTRE - r * Math.cos(angle)).toFixed(2)}`;
  };
  const far = many / size > 0.5 ? 1 : 0;
  return draw("path", { class: "arc " + kind, "stroke-width": width,
    d: `M${point(start)}A${r} ${r} 0 ${far} 1 ${point(start + many)}` });
}

/* A mark at the edge between two entries, outside of the circle or inside. */
function hand(text, at, size, out) {
  const angle = 2 * Math.PI * at / size, s = Math.sin(angle), c = -Math.cos(angle);
  const place = (r, side) => `${(CENTRE + r * s - side * c).toFixed(2)} ${(CENTRE + r * c + side * s).toFixed(2)}`;
  /* A word is wider than it is high, so at the sides it stands farther off. */
  const tip = out ? R + 12 : R - 16, base = out ? R + 21 : R - 25;
  const word = out ? base + 7 + 14 * Math.abs(s) : base - 7 - 14 * Math.abs(s);
  const group = draw("g", {});
  group.append(draw("path", { class: "hand", d: `M${place(tip, 0)}L${place(base, 5)}L${place(base, -5)}z` }),
    draw("text", { class: "hand-text", x: CENTRE + word * s, y: CENTRE + word * c }, text));
  return group;
}

class Queue {
  constructor() {
    this.title = el("h3", {});
    this.ring = draw("svg", { class: "ring", viewBox: "-50 -16 340 272", role: "img" });
    this.facts = el("dl");
    this.note = el("p", { class: "note" });
    this.wrong = el("p", { class: "wrong" });
    this.map = draw("svg", { class: "map", role: "img" });
    this.chains = el("div");
    this.more = el("details", {}, el("summary", {}, "Chains and descriptors"), this.map, this.chains);
    this.root = el("figure", { class: "queue" }, this.title, this.ring,
      el("figcaption", {}, this.facts, this.note, this.wrong, this.more));
    this.before = null;
    this.more.addEventListener("toggle", () => this.inside());
  }

  update(q) {
    this.q = q;
    put(this.title, `queue ${q.index}, ${q.role}`);
    put(this.note, q.note || "");
    put(this.wrong, (q.problems || []).join("; "));
    const used = q.format !== undefined;
    this.ring.style.display = used ? "" : "none";
    this.facts.hidden = this.more.hidden = !used;
    if (!used) {
      this.before = null;
      return;
    }
    this.picture(q);
    this.words(q);
    this.inside();
  }

  /* Entries of the ring that have been returned since the look before, at most all. */
  returned(q) {
    const at = q.format === "packed" ? q.device.next + (q.device.wrap ? 0 : q.size) : q.used.idx;
    const laps = q.format === "packed" ? 2 * q.size : 65536;
    const same = this.before && this.before.size === q.size && this.before.format === q.format;
    const many = same ? (at - this.before.at + laps) % laps : 0;
    this.before = { at, size: q.size, format: q.format };
    return Math.min(many, q.size);
  }

  picture(q) {
    const size = q.size, packed = q.format === "packed";
    const device = packed ? q.device.next : q.used.idx % size;
    const driver = packed ? q.driver.next : q.avail.idx % size;
    const back = this.returned(q);
    const nodes = [draw("circle", { class: "free", cx: CENTRE, cy: CENTRE, r: R, "stroke-width": 18 })];
    for (const [kind, start, many] of q.regions) nodes.push(arc(kind, R, start, many, size, 18));
    if (back) nodes.push(arc("returned", R - 13, (device - back + size) % size, back, size, 4));
    for (let n = 0; n < 4; n++) {
      const [x, y] = turn(n / 4), pull = (v) => CENTRE + (v - CENTRE) * 0.93;
      const far = (v) => CENTRE + (v - CENTRE) * 1.07;
      nodes.push(draw("line", { class: "tick", x1: pull(x), y1: pull(y), x2: far(x), y2: far(y) }));
    }
    nodes.push(hand("driver", driver, size, true), hand("device", device, size, false));
    const digits = String(q.outstanding).length > 3 ? "big long" : "big";
    nodes.push(draw("text", { class: digits, x: CENTRE, y: CENTRE - 4 }, String(q.outstanding)),
      draw("text", { class: "small", x: CENTRE, y: CENTRE + 18 }, "with device"));
    this.ring.replaceChildren(...nodes);
    this.ring.setAttribute("aria-label", `${q.format} ring of ${size} entries: ${q.outstanding} with` +
      ` the device, driver at ${driver}, device at ${device}`);
  }

  words(q) {
    const rows = [["ring", `${q.format}, ${q.size} entries`]];
    if (q.format === "split") {
      rows.push(["available idx", String(q.avail.idx)], ["used idx", String(q.used.idx)]);
      if (q.taken !== null) rows.push(["taken up to", String(q.taken)]);
    } else {
      const side = (s) => `${s.next}, wrap counter ${s.wrap}`;
      rows.push(["driver next", side(q.driver)], ["device next", side(q.device)]);
      if (q.taken !== null) rows.push(["taken up to", side(q.taken)]);
    }
    if (q["in-flight"] !== null) rows.push(["in flight", String(q["in-flight"])]);
    rows.push(["asks", q.asks]);
    rows.push(["interrupt", q.vector === 0xffff ? "no vector" : `MSI-X vector ${q.vector}`]);
    while (this.facts.children.length > 2 * rows.length) this.facts.lastChild.remove();
    rows.forEach(([name, value], n) => {
      if (this.facts.children.length <= 2 * n) this.facts.append(el("dt"), el("dd"));
      put(this.facts.children[2 * n], name);
      put(this.facts.children[2 * n + 1], value);
    });
  }

  /* What is in the closed part is drawn only if that is open. */
  inside() {
    const q = this.q;
    if (!this.more.open || !q || q.format === undefined) return;
    const wide = 64, rows = Math.ceil(q.map.length / wide);
    this.map.setAttribute("viewBox", `0 0 ${wide * 5} ${rows * 6}`);
    const paths = new Map();
    [...q.map].forEach((letter, n) => {
      const cell = `M${n % wide * 5} ${Math.floor(n / wide) * 6}h4v5h-4z`;
      paths.set(letter, (paths.get(letter) || "") + cell);
    });
    const classes = { D: "m-device", d: "m-device lap0", U: "m-used", u: "m-used lap0", ".": "m-free" };
    this.map.replaceChildren(...[...paths].map(([letter, d]) => draw("path", { class: classes[letter], d })));
    this.map.setAttribute("aria-label", `${q.owned} of ${q.size} descriptors are the device's`);
    const list = [];
    const line = (text) => list.push(el("div", {}, el("code", {}, text)));
    const less = q.size > q.map.length ? `, of which ${q.map.length} are drawn` : "";
    list.push(el("div", {}, `${q.owned} of ${q.size} descriptors are the device's${less}.`));
    if (q.next.length) list.push(el("div", { class: "note" }, "The device has, next first:"));
    for (const c of q.next) line(`[${c.at}] head ${c.head}: ${c.words}`);
    if (q.returned.length) list.push(el("div", { class: "note" }, "Returned last:"));
    for (const r of q.returned) line(`[${r.at}] ${r.id}, ${r.len} bytes written`);
    this.chains.replaceChildren(...list);
  }
}

/* --- a card --- */

const UNCOUNTED = "A dash: nobody counts it on this data path";
const WAYS = [["rx", "To the guest"], ["tx", "From the guest"]];

class Card {
  constructor(name) {
    this.name = name;
    this.mode = el("span", { class: "pill mode" });
    this.facts = el("span", { class: "note" });
    this.note = el("p", { class: "note" });
    this.workers = el("p", { class: "note" });
    this.tiles = [];
    const title = el("h2", { tabindex: "-1" }, name);
    this.root = el("section", { class: "panel", "data-card": name, "aria-label": "Card " + name },
      el("header", {}, title, this.mode, this.facts));
    const both = el("div", { class: "directions" });
    for (const [way, words] of WAYS) {
      const own = (r) => r.nets.find((n) => n.name === name) || {};
      const bits = (n) => (n === null || n === undefined ? n : n * 8 / 1e6);
      const tiles = [
        new Tile("packets per second", (r) => own(r)[way + "_packets"], UNCOUNTED),
        new Tile("Mbit per second", (r) => bits(own(r)[way + "_bytes"]), UNCOUNTED),
        new Tile("kicks per second", (r) => own(r)[way + "_kicks"], UNCOUNTED),
        new Tile("interrupts per second", (r) => own(r)[way + "_calls"], UNCOUNTED),
      ];
      this.tiles.push(...tiles);
      both.append(el("div", { class: "direction" }, el("h3", {}, words),
        el("div", { class: "tiles" }, ...tiles.map((t) => t.root))));
    }
    const key = (kind, text) => el("span", {}, el("span", { class: "key " + kind }), text);
    this.legend = el("div", { class: "legend" }, key("available", "available"),
      key("in-flight", "in flight"), key("returned", "returned since the last look"),
      key("free", "driver's"));
    this.queues = [];
    this.place = el("div", { class: "queues" });
    this.root.append(both, this.workers, this.note, this.legend, this.place);
  }

  update(card, rates) {
    put(this.mode, card.mode);
    const where = card.slot === null ? "MMIO" : `slot ${card.slot}`;
    put(this.facts, [card.mac, where, card.tap && `tap ${card.tap}`, card.notify && `notify=${card.notify}`,
      card.link ? "" : "cable pulled", card.state === "present" ? "" : card.state]
      .filter(Boolean).join(" · "));
    put(this.note, card.note || "");
    this.note.hidden = !card.note;
    const own = rates && rates.nets.find((n) => n.name === this.name);
    put(this.workers, own && own.workers.length
      ? own.workers.map((w) => `${w.name}: ${number(w.cpu_percent)} % of a CPU`).join(" · ") : "");
    for (const tile of this.tiles) tile.update(rates);
    while (this.queues.length > card.queues.length) this.queues.pop().root.remove();
    card.queues.forEach((q, n) => {
      if (!this.queues[n]) {
        this.queues.push(new Queue());
        this.place.append(this.queues[n].root);
      }
      this.queues[n].update(q);
    });
    this.legend.hidden = !card.queues.some((q) => q.format);
  }
}

/* --- the page --- */

const cards = new Map();
const totals = [
  new Tile("exits to pyvmm per second", (r) => r.exits),
  new Tile("exits in KVM per second", (r) => add(r.vcpus.map((v) => v.kvm_exits)),
    "All exits of the guest; most are handled in KVM"),
  new Tile("interrupts to the guest per second", (r) => add(r.vcpus.map((v) => v.interrupts))),
];
$("totals").append(...totals.map((t) => t.root));

function status(word, text) {
  $("status").className = "pill " + word;
  put($("status"), text);
}

function notice(text) {
  $("notice").hidden = !text;
  put($("notice"), text);
}

function show(look) {
  latest = look;
  if (look.number < last) history = [];
  last = look.number;
  history.push(...look.history.filter((h) => !history.length || h.number > history[history.length - 1].number));
  history.splice(0, history.length - KEPT);
  hear(look.events);
  if (look.name === undefined) return; /* it has ended before the first look */
  document.title = `${look.name}: pyvmm watch`;
  put($("name"), look.name);
  status(look.ended ? "ended" : look.status, look.status);
  const reboots = look.reboots ? ` · ${look.reboots} reboot${look.reboots > 1 ? "s" : ""}` : "";
  put($("facts"), `${look.cpus} vCPU${look.cpus > 1 ? "s" : ""} · ${Math.round(look.memory / 1048576)} MiB${reboots}`);
  for (const tile of totals) tile.update(look.rates);
  const there = new Set(look.cards.map((c) => c.name));
  for (const [name, card] of cards) {
    if (there.has(name)) continue;
    card.root.remove();
    cards.delete(name);
  }
  for (const card of look.cards) {
    if (!cards.has(card.name)) {
      cards.set(card.name, new Card(card.name));
      $("cards").append(cards.get(card.name).root);
    }
    cards.get(card.name).update(card, look.rates);
  }
  causes(look.rates);
}

function causes(rates) {
  if (!rates) return;
  const all = Object.entries(rates.by_name), shown = all.slice(0, ROWS);
  const rest = all.slice(ROWS).reduce((sum, [, rate]) => sum + (rate || 0), 0);
  if (rest) shown.push(["other causes", rest]);
  const most = Math.max(1, ...shown.map(([, rate]) => rate || 0));
  $("causes").replaceChildren(...shown.map(([name, rate]) => {
    const share = el("div", { class: "share" });
    share.style.width = `${100 * (rate || 0) / most}%`;
    return el("tr", {}, el("td", {}, name, share), el("td", { class: "num" }, number(rate)));
  }));
  if (!shown.length) $("causes").append(el("tr", {}, el("td", { colspan: "2" }, "none in this interval")));
}

function hear(all) {
  const known = events.length ? events[events.length - 1].id : 0;
  const fresh = all.filter((e) => e.id > known);
  const same = (e, i) => events[i] && events[i].text === e.text;
  if (!fresh.length && all.every(same)) return; /* a switch gets its time later */
  const first = !latest || !events.length;
  events = all;
  $("events").replaceChildren(...[...all].reverse().map((e) =>
    el("li", { class: e.kind }, el("time", {}, clock(e.time)), e.text)));
  if (fresh.length && (!first || fresh.length === 1)) put($("live"), fresh[fresh.length - 1].text);
}

/* Ask while somebody looks. */
let halted = false, asking = false, over = false, failures = 0;

async function ask() {
  if (asking) return;
  asking = true;
  while (!halted && !document.hidden && !over) {
    try {
      const answer = await fetch("look?after=" + last, { cache: "no-store", credentials: "omit" });
      if (answer.status === 503) {
        notice("Too many look at this machine at once; trying again.");
        await new Promise((done) => setTimeout(done, RETRY_MS));
        continue;
      }
      if (!answer.ok) throw new Error(String(answer.status));
      const look = await answer.json();
      failures = 0;
      if (!halted) notice(""); // an answer on its way when the reader halted the page
      show(look);
      if (look.ended) finish("ended", look.ended[0].toUpperCase() + look.ended.slice(1) + ".");
    } catch (error) {
      failures += 1;
      if (failures >= FAILURES) finish("lost", "pyvmm watch has ended, or does not answer. Start it again for another address.");
      else await new Promise((done) => setTimeout(done, RETRY_MS / 4));
      if (!(error instanceof TypeError)) console.error(error);
    }
  }
  asking = false;
}

function finish(word, text) {
  over = true;
  document.body.classList.add("over");
  status(word, word === "ended" ? "ended" : "lost");
  notice(text);
  put($("live"), text);
}

function halt() {
  halted = !halted;
  $("pause").setAttribute("aria-pressed", halted);
  put($("pause"), halted ? "Go on" : "Pause");
  if (!over) notice(halted ? "This page stands still, and nothing is asked of the machine." : "");
  if (!halted) ask();
}

const help = $("help");
$("pause").addEventListener("click", halt);
$("keys").addEventListener("click", () => (help.open ? help.close() : help.showModal()));
$("close").addEventListener("click", () => help.close());
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });

function goTo(node) {
  if (!node) return;
  node.scrollIntoView({ block: "start" });
  node.focus({ preventScroll: true });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.closest("button, summary") && [" ", "Enter"].includes(event.key)) return;
  const acts = {
    " ": halt,
    "?": () => help.showModal(),
    e: () => goTo($("events-title")),
    d: () => {
      const all = [...document.querySelectorAll(".queue details")].filter((d) => !d.hidden);
      const open = !all.every((d) => d.open);
      all.forEach((d) => { d.open = open; });
    },
  };
  const card = /^[1-9]$/.test(event.key) && [...cards.values()][Number(event.key) - 1];
  const act = acts[event.key] || (card && (() => goTo(card.root.querySelector("h2"))));
  if (!act) return;
  event.preventDefault();
  act();
});

ask();
