"use strict";
/* SPDX-License-Identifier: MIT */
/*
 * Draws sequence diagrams from the data in this page. Text of the trace becomes text nodes and
 * nothing else: it may come from a hostile guest. Only the rows in sight are in the document.
 */
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const ROW = 36, FONT = 12;
const ruler = document.createElement("canvas").getContext("2d");

/* Put the texts back in the place of their numbers. */
function inflate(row) {
  for (const arrow of row.n === undefined ? [row] : [...row.first, ...(row.more || [])]) {
    if (arrow.i === undefined) continue;
    const numbers = arrow.x;
    arrow.l = DATA.texts[arrow.l];
    arrow.x = [];
    for (let at = 0; at < numbers.length; at += 3)
      arrow.x.push([DATA.texts[numbers[at]], DATA.texts[numbers[at + 1]], numbers[at + 2]]);
  }
}
DATA.traces.forEach((trace) => trace.rows.forEach(inflate));

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

function time(us) {
  if (us === null || us === undefined) return "";
  if (us >= 1e6) return (us / 1e6).toFixed(3) + " s";
  if (us >= 1e3) return (us / 1e3).toFixed(us >= 1e5 ? 1 : 2) + " ms";
  return us.toFixed(us >= 100 ? 0 : us >= 10 ? 1 : 2) + " µs";
}

/* One sequence diagram. */
class Diagram {
  constructor(trace, number) {
    this.trace = trace;
    this.number = number;
    this.open = new Set();
    this.flow = "all";
    this.zoom = 1;
    this.selected = -1;
    this.mark = "";
    this.whole = false;
    this.head = draw("svg", { class: "head" });
    this.body = draw("svg", { class: "body" });
    this.space = el("div", { class: "space" }, this.body);
    this.scroll = el("div", {
      class: "scroll", tabindex: "0", role: "listbox",
      "aria-label": "Sequence diagram of " + trace.title,
    }, this.space);
    this.root = el("section", { class: "diagram" },
      el("h2", {}, trace.title), el("p", { class: "note" }, trace.subtitle), this.head, this.scroll);
    if (trace.quiet) this.root.append(el("p", { class: "quiet" }, trace.quiet));
    this.scroll.addEventListener("scroll", () => this.paint());
    this.scroll.addEventListener("focus", () => { active = this; });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (!row) return;
      active = this;
      this.scroll.focus({ preventScroll: true });
      const at = Number(row.getAttribute("data-row"));
      this.select(at);
      this.toggle(at);
    });
    this.layOut();
  }

  /* The rows that are shown, folds opened. */
  layOut() {
    const rows = [];
    const fits = (a) => this.flow === "all" || a.f === this.flow || a.f === "hand-over";
    this.trace.rows.forEach((row, id) => {
      if (row.h !== undefined || row.gap !== undefined) {
        rows.push(row);
      } else if (row.n === undefined) {
        if (fits(row)) rows.push(row);
      } else if (row.first.some(fits)) {
        row.id = id;
        const first = row.first.filter(fits);
        rows.push(row, ...first.map((a) => ({ ...a, inside: true })));
        if (row.more && this.open.has(id))
          rows.push(...row.more.filter(fits).map((a) => ({ ...a, inside: true })));
      }
    });
    /* A header without anything below it says nothing. */
    this.rows = rows.filter((row, i) =>
      row.h === undefined || (rows[i + 1] && rows[i + 1].h === undefined));
    this.resize();
  }

  resize() {
    const width = Math.max(this.scroll.clientWidth, 280);
    this.width = width;
    this.left = width > 700 ? 92 : 0;
    const step = (width - this.left) / this.trace.lifelines.length;
    this.x = this.trace.lifelines.map((_, i) => this.left + step * (i + 0.5));
    this.row = ROW * this.zoom;
    const height = this.rows.length * this.row + 12;
    this.space.style.height = height + "px";
    this.drawHead(width, step);
    this.paint();
  }

  drawHead(width, step) {
    const wide = step > 96;
    this.head.replaceChildren();
    this.head.setAttribute("viewBox", `0 0 ${width} 46`);
    this.head.style.width = width + "px";
    this.head.style.height = "46px";
    this.trace.lifelines.forEach((line, i) => {
      const box = Math.min(step - 4, 150);
      const group = draw("g", { class: "life " + line.id + (line.seen ? "" : " unseen") });
      group.append(
        draw("rect", { x: this.x[i] - box / 2, y: 3, width: box, height: 38, rx: 6 }),
        draw("text", { x: this.x[i], y: step > 112 ? 19 : 26, "text-anchor": "middle",
          "font-size": step < 50 ? 10 : wide ? 13 : 11 }, line.name),
        draw("title", {}, `${line.name}: ${line.where}${line.seen ? "" : "; no event of this trace"}`));
      if (step > 112) group.append(draw("text", { class: "where", x: this.x[i], y: 34,
        "text-anchor": "middle", "font-size": 10.5 }, line.where));
      this.head.append(group);
    });
  }

  /* Draw the rows in sight; all of them for paper. */
  paint() {
    const all = this.whole;
    const from = all ? 0 : Math.max(Math.floor(this.scroll.scrollTop / this.row) - 8, 0);
    const shown = this.scroll.clientHeight || 600;
    const to = all ? this.rows.length
      : Math.min(Math.ceil((this.scroll.scrollTop + shown) / this.row) + 8, this.rows.length);
    const top = from * this.row, height = Math.max((to - from) * this.row + 12, 12);
    this.body.replaceChildren();
    this.body.setAttribute("viewBox", `0 ${top} ${this.width} ${height}`);
    this.body.style.top = top + "px";
    this.body.style.width = this.width + "px";
    this.body.style.height = height + "px";
    for (let i = from; i < to; i++) this.backdrop(this.rows[i], i);
    this.x.forEach((x, i) => this.body.append(draw("line", {
      class: "lifeline " + (this.trace.lifelines[i].seen ? "" : "unseen"),
      x1: x, x2: x, y1: top, y2: top + height,
    })));
    for (let i = from; i < to; i++) this.body.append(this.one(this.rows[i], i));
  }

  backdrop(row, i) {
    const y = i * this.row;
    const at = row.t;
    if (this.trace.bands.some(([begin, end]) => at >= begin && at <= end))
      this.body.append(draw("rect", { class: "band", x: 0, y, width: this.width, height: this.row }));
    if (row.inside)
      this.body.append(draw("rect", { class: "fold", x: this.left, y, width: 3, height: this.row }));
    if (i === this.selected)
      this.body.append(draw("rect", { class: "chosen", x: 0, y, width: this.width, height: this.row }));
  }

  one(row, i) {
    const y = i * this.row, size = FONT * Math.min(Math.max(this.zoom, 0.75), 1.4);
    const group = draw("g", {
      "data-row": i, role: "option", "aria-selected": i === this.selected, id: this.id(i),
      class: "row " + (row.k || "") + (this.hit(row) ? " hit" : ""),
    });
    group.append(draw("rect", {
      class: "catch", x: 0, y, width: this.width, height: this.row }));
    if (row.h !== undefined) {
      group.classList.add("header");
      group.append(draw("line", { x1: 0, x2: this.width, y1: y + 4, y2: y + 4 }));
      this.text(group, row.h, y + this.row * 0.68, size + 1, 6);
      return group;
    }
    if (row.gap !== undefined) {
      group.classList.add("gap");
      this.text(group, `${row.gap} arrows left out here, to keep the page small`,
        y + this.row * 0.62, size, this.left + 10);
      return group;
    }
    if (row.n !== undefined) {
      group.classList.add("folded");
      const sign = row.more ? (this.open.has(row.id) ? "▾" : "▸") : "≡";
      const what = row.period === 1 ? "this arrow" : `these ${row.period} arrows`;
      const more = row.more ? "" : `; ${row.period * (row.n - 1)} left out`;
      this.text(group, `${sign} ${what}: ${row.n} times in ${time(row.t1 - row.t)}${more}`,
        y + this.row * 0.62, size, this.left + 10);
      return group;
    }
    this.arrow(group, row, y, size);
    return group;
  }

  id(i) {
    return `d${this.number}r${i}`;
  }

  hit(row) {
    return this.mark !== "" && row.l !== undefined && words(row).includes(this.mark);
  }

  arrow(group, row, y, size) {
    const from = this.x[row.s], to = this.x[row.e], line = y + this.row * 0.72;
    group.setAttribute("data-event", row.i);
    if (this.left)
      group.append(draw("text", { class: "time", x: this.left - 8, y: y + this.row * 0.42,
        "text-anchor": "end", "font-size": size - 1 }, time(row.t)));
    if (from === to) {
      const out = from + 26;
      group.append(draw("path", { class: "line",
        d: `M${from} ${line - 6}H${out}V${line + 4}H${from + 6}` }));
      group.append(head(from, line + 4, -1));
    } else {
      const way = to > from ? 1 : -1;
      group.append(draw("line", { class: "line", x1: from, x2: to - way * 5, y1: line, y2: line }));
      group.append(head(to, line, way));
      for (const via of row.v)
        group.append(draw("circle", { class: "via", cx: this.x[via], cy: line, r: 3 }));
    }
    this.text(group, row.l, y + this.row * 0.42, size, Math.min(from, to) + 6,
      row.d ? time(row.d) : "");
  }

  /* A line of text that stays within the diagram. */
  text(group, text, y, size, x, more) {
    const room = this.width - this.left - 8;
    ruler.font = `${size}px system-ui, sans-serif`;
    const tail = more ? ruler.measureText(more).width + 10 : 0;
    let wide = ruler.measureText(text).width;
    if (wide + tail > room) {
      let keep = Math.max(Math.floor(text.length * (room - tail - 12) / wide), 3);
      text = text.slice(0, keep) + "…";
      wide = ruler.measureText(text).width;
    }
    const at = Math.max(Math.min(x, this.width - 6 - wide - tail), this.left + 4);
    const node = draw("text", { class: "label", x: at, y, "font-size": size }, text);
    if (more) {
      node.append(draw("tspan", { class: "took", dx: 8 }, more));
    }
    group.append(node);
  }

  select(i, quietly) {
    if (i < 0 || i >= this.rows.length) return;
    this.selected = i;
    const top = i * this.row, box = this.scroll;
    if (top < box.scrollTop + this.row) box.scrollTop = Math.max(top - this.row * 2, 0);
    else if (top + this.row * 3 > box.scrollTop + box.clientHeight)
      box.scrollTop = top + this.row * 3 - box.clientHeight;
    this.paint();
    box.setAttribute("aria-activedescendant", this.id(i));
    if (!quietly) {
      show(this, this.rows[i]);
      pair(this, this.rows[i]);
    }
  }

  step(by) {
    let i = this.selected + by;
    while (this.rows[i] && this.rows[i].h !== undefined) i += by;
    this.select(Math.min(Math.max(i, 0), this.rows.length - 1));
  }

  packet(by) {
    const now = this.selected < 0 ? 0 : this.rows[this.selected].p || 0;
    for (let i = this.selected + by; i >= 0 && i < this.rows.length; i += by) {
      const p = this.rows[i].p;
      if (!p || p === now) continue;
      if (by < 0) while (i > 0 && this.rows[i - 1].p === p) i--;
      this.select(i);
      return true;
    }
    return false;
  }

  toggle(at) {
    const row = this.rows[at];
    if (!row || row.n === undefined || !row.more) return;
    if (!this.open.delete(row.id)) this.open.add(row.id);
    this.layOut();
    this.select(at);
  }

  unfold(all) {
    this.open.clear();
    if (all) this.trace.rows.forEach((row, id) => { if (row.more) this.open.add(id); });
    this.selected = -1;
    this.layOut();
  }

  choose(flow) {
    const row = this.rows[this.selected];
    this.flow = flow;
    this.layOut();
    this.selected = row ? this.rows.findIndex((other) => other.i === row.i && other.l === row.l) : -1;
    this.paint();
  }

  /* Find the next arrow with a text, also inside of folds. Returns [place, how many]. */
  find(text, by) {
    this.mark = text.toLowerCase();
    if (!this.mark) {
      this.paint();
      return [0, 0];
    }
    let opened = false;
    this.trace.rows.forEach((row, id) => {
      if (row.more && !this.open.has(id) && row.more.some((a) => words(a).includes(this.mark)) &&
          !row.first.some((a) => words(a).includes(this.mark))) {
        this.open.add(id);
        opened = true;
      }
    });
    if (opened) this.layOut();
    const hits = this.rows.map((row, i) => (this.hit(row) ? i : -1)).filter((i) => i >= 0);
    if (!hits.length) {
      this.paint();
      return [0, 0];
    }
    const at = by < 0 ? hits.filter((i) => i < this.selected).pop()
      : hits.find((i) => (by > 0 ? i > this.selected : i >= Math.max(this.selected, 0)));
    const chosen = at === undefined ? (by < 0 ? hits[hits.length - 1] : hits[0]) : at;
    this.select(chosen);
    return [hits.indexOf(chosen) + 1, hits.length];
  }
}

function head(x, y, way) {
  return draw("path", { class: "tip", d: `M${x} ${y}l${-way * 8} -4v8z` });
}

function words(row) {
  if (row.words === undefined) {
    row.words = [row.l || row.h || "", ...(row.x || []).map(([name, value]) => name + " " + value)]
      .join("\n").toLowerCase();
  }
  return row.words;
}

/* --- details of a row --- */

const details = document.getElementById("details");

function show(diagram, row) {
  details.replaceChildren();
  const body = el("tbody");
  const line = (name, value, changed) => body.append(
    el("tr", changed ? { class: "changed" } : {}, el("th", { scope: "row" }, name),
      el("td", {}, ...(value instanceof Node ? [value] : [String(value)]))));
  if (row.h !== undefined) {
    details.append(el("h3", {}, row.h), el("p", { class: "note" }, "from " + time(row.t) + " on"));
    return say(row.h);
  }
  if (row.gap !== undefined) {
    details.append(el("h3", {}, `${row.gap} arrows left out`));
    line("from", time(row.t));
    line("to", time(row.t1));
    details.append(el("table", {}, body));
    return say(`${row.gap} arrows left out`);
  }
  if (row.n !== undefined) {
    details.append(el("h3", {}, `${row.period} arrow${row.period > 1 ? "s" : ""}, ${row.n} times`));
    line("from", time(row.t));
    line("to", time(row.t1));
    line("in the page", row.more ? "all; Enter opens and closes" : "the first time only");
    const spread = el("table", {}, el("thead", {}, el("tr", {},
      ...["arrow", "lowest", "median", "highest"].map((t) => el("th", { scope: "col" }, t)))));
    const rows = el("tbody");
    row.first.forEach((arrow, i) => rows.append(el("tr", {},
      el("th", { scope: "row" }, arrow.l), ...row.spread[i].map((us) =>
        el("td", { class: "num" }, us ? time(us) : "–")))));
    spread.append(rows);
    details.append(el("table", {}, body), el("h4", {}, "How long each took"), spread);
    return say(`${row.period} arrows, ${row.n} times`);
  }
  const lines = diagram.trace.lifelines;
  details.append(el("h3", { class: row.k }, row.l));
  const way = [row.s, ...row.v, row.e].map((i) => lines[i].name).join(" → ");
  line("way", row.s === row.e ? lines[row.s].name : way);
  line("at", time(row.t) + " after the VMM's start");
  if (row.d) line("took", time(row.d));
  let bytes = "", header = 0;
  for (const [name, value, changed] of row.x) {
    if (name === "bytes") bytes = value;
    else line(name, value, changed);
    if (name === "length") header = Number((value.match(/(\d+) of them/) || [0, 0])[1]);
  }
  line("event", `number ${row.i} of the trace`);
  details.append(el("table", {}, body));
  if (row.r) details.append(...ring(row.r));
  if (bytes) details.append(el("h4", {}, "First bytes"), hex(bytes, header));
  say(`${row.l}, ${way}, ${time(row.d)}`);
}

/* A dump: the virtio_net_hdr and the Ethernet header have colours of their own. */
function hex(text, header) {
  const dump = el("pre", { class: "bytes" });
  const kind = (i) => (i < header ? "vnet" : i < header + 14 ? "ether" : "payload");
  for (let at = 0; at < text.length / 2; at += 16) {
    dump.append(at.toString(16).padStart(4, "0") + "  ");
    for (let i = at; i < at + 16 && i < text.length / 2; i++)
      dump.append(el("span", { class: kind(i) }, text.slice(2 * i, 2 * i + 2)), i % 8 === 7 ? "  " : " ");
    dump.append("\n");
  }
  return dump;
}

/* The rings as the data path saw them. */
function ring(r) {
  const out = [];
  const cell = (position, size) => (r.packed ? position & 0x7fff : position) % size;
  const strip = (title, states, from) => {
    const svg = draw("svg", { class: "ring", viewBox: `0 0 ${states.length * 18} 30`, role: "img" });
    svg.append(draw("title", {}, title));
    states.forEach((state, i) => {
      svg.append(draw("rect", { class: state, x: i * 18 + 1, y: 1, width: 15, height: 14, rx: 2 }));
      if (i % 4 === 0) svg.append(draw("text", { x: i * 18 + 8, y: 27, "text-anchor": "middle",
        "font-size": 9 }, String(from(i))));
    });
    out.push(el("h4", {}, title), svg);
  };
  const size = r.size || 16, many = Math.min(size, 16);
  const window = (position) => (i) => (cell(position, size) - Math.min(4, many - 1) + i + size) % size;
  const facts = el("tbody");
  const fact = (name, value, changed) => facts.append(el("tr", changed ? { class: "changed" } : {},
    el("th", { scope: "row" }, name), el("td", {}, value)));
  if (r.moment === "published") {
    const place = window(r.used_idx), mine = Math.min(4, many - 1);
    const fresh = r.used_before === null ? 1 : (r.used_idx - r.used_before + 65536) % 65536;
    strip(r.packed ? "Descriptor ring" : "Used ring", [...Array(many).keys()].map((i) =>
      i < mine ? (i >= mine - fresh ? "fresh" : "done") : i === mine ? "next" : "free"), place);
    fact("used index", r.packed ? `${r.used_idx & 0x7fff}, wrap counter ${r.used_idx >> 15}`
      : `${r.used_before === null ? "" : r.used_before + " → "}${r.used_idx}`, true);
    if (r.used_event !== null) fact("used_event (the driver's)", String(r.used_event));
  } else if (r.packed) {
    const at = r.moment === "taken" ? r.avail_at : r.used_at;
    const mine = Math.min(4, many - 1);
    strip("Descriptor ring", [...Array(many).keys()].map((i) =>
      i < mine ? "done" : i === mine ? "fresh" : "free"), window(at));
    fact("descriptor", String(at & 0x7fff), true);
    fact("wrap counter", String(at >> 15));
    fact("buffer id", String(r.head), r.moment === "returned");
  } else {
    const mine = Math.min(4, many - 1), pending = (r.avail_idx - r.avail_at + 65536) % 65536;
    if (r.moment === "taken") {
      strip("Available ring", [...Array(many).keys()].map((i) =>
        i < mine ? "done" : i === mine ? "fresh" : i - mine < pending ? "pending" : "free"),
      window(r.avail_at));
      fact("next entry of the device", `${r.avail_at} → ${(r.avail_at + 1) % 65536}`, true);
      fact("available index (the driver's)", String(r.avail_idx));
      fact(`available[${cell(r.avail_at, size)}]`, `head ${r.head}`, true);
    } else {
      strip("Used ring", [...Array(many).keys()].map((i) =>
        i < mine ? "done" : i === mine ? "fresh" : "free"), window(r.used_at));
      fact(`used[${cell(r.used_at, size)}]`, `id ${r.head}, len ${r.len}`, true);
      fact("used index", `${r.used_at}, not published yet`);
    }
  }
  out.push(el("table", {}, facts));
  if (r.segments) {
    const table = el("table", {}, el("thead", {}, el("tr", {},
      ...["descriptor", "address", "length", "flags"].map((t) => el("th", { scope: "col" }, t)))));
    const rows = el("tbody");
    r.segments.forEach((text, i) => {
      const [address, length] = text.split("+");
      rows.append(el("tr", {}, el("th", { scope: "row" }, i ? `+${i}` : String(r.head)),
        el("td", {}, address), el("td", { class: "num" }, length || ""),
        el("td", {}, (r.writes ? "WRITE" : "") + (i + 1 < r.descriptors ? " NEXT" : ""))));
    });
    table.append(rows);
    out.push(el("h4", {}, "Descriptors"), table);
    if (r.descriptors > r.segments.length)
      out.push(el("p", { class: "note" }, `${r.descriptors - r.segments.length} more not traced`));
  }
  return out;
}

const live = document.getElementById("live");
function say(text) {
  live.textContent = text;
}

/* --- the page --- */

const diagrams = DATA.traces.map((trace, i) => new Diagram(trace, i));
let active = diagrams[0];
document.getElementById("diagrams").append(...diagrams.map((d) => d.root));

/* With two traces: the same packet in the other one. */
function pair(diagram, row) {
  if (!row.p) return;
  for (const other of diagrams) {
    if (other === diagram) continue;
    const same = (r) => r.m === row.m;
    const at = other.rows.findIndex((r) => same(r) && r.k === row.k);
    other.select(at >= 0 ? at : other.rows.findIndex(same), true);
  }
}

const each = (id, event, act) => document.getElementById(id).addEventListener(event, act);
const search = document.getElementById("search"), found = document.getElementById("found");

function find(by) {
  const [at, all] = active.find(search.value, by);
  diagrams.filter((d) => d !== active).forEach((d) => { d.mark = active.mark; d.paint(); });
  found.textContent = search.value ? (all ? `${at} of ${all}` : "nothing found") : "";
}

function zoom(by) {
  for (const d of diagrams) {
    const place = d.scroll.scrollTop / d.row;
    d.zoom = Math.min(Math.max(by ? d.zoom * by : 1, 0.5), 2.5);
    d.resize();
    d.scroll.scrollTop = place * d.row;
  }
}

function choose(flow) {
  for (const button of document.querySelectorAll("[data-flow]"))
    button.setAttribute("aria-pressed", button.getAttribute("data-flow") === flow);
  diagrams.forEach((d) => d.choose(flow));
}

const help = document.getElementById("help");
for (const button of document.querySelectorAll("[data-flow]"))
  button.addEventListener("click", () => choose(button.getAttribute("data-flow")));
each("back", "click", () => active.step(-1));
each("next", "click", () => active.step(1));
each("packet-back", "click", () => active.packet(-1));
each("packet-next", "click", () => active.packet(1));
each("out", "click", () => zoom(1 / 1.25));
each("in", "click", () => zoom(1.25));
each("unfold", "click", (event) => {
  const all = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", all);
  diagrams.forEach((d) => d.unfold(all));
});
each("keys", "click", () => (help.open ? help.close() : help.showModal()));
each("close", "click", () => help.close());
search.addEventListener("input", () => find(0));
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") find(event.shiftKey ? -1 : 1);
  else if (event.key === "Escape") { search.value = ""; find(0); active.scroll.focus(); }
  else return;
  event.preventDefault();
});

const FLOWS = [...document.querySelectorAll("[data-flow]")].map((b) => b.getAttribute("data-flow"));
document.addEventListener("keydown", (event) => {
  if (event.target === search || event.ctrlKey || event.metaKey || event.altKey) return;
  if (help.open) return;
  const press = event.target.closest("button, summary") && [" ", "Enter"].includes(event.key);
  if (press) return;
  const acts = {
    ArrowDown: () => active.step(1), j: () => active.step(1),
    ArrowUp: () => active.step(-1), k: () => active.step(-1),
    ArrowRight: () => active.packet(1), n: () => active.packet(1),
    ArrowLeft: () => active.packet(-1), p: () => active.packet(-1),
    Enter: () => active.toggle(active.selected), " ": () => active.toggle(active.selected),
    Home: () => active.select(0), End: () => active.select(active.rows.length - 1),
    "/": () => search.focus(), "+": () => zoom(1.25), "-": () => zoom(1 / 1.25), 0: () => zoom(0),
    "?": () => help.showModal(), u: () => document.getElementById("unfold").click(),
    Tab: null,
  };
  const flow = FLOWS[Number(event.key) - 1];
  const act = acts[event.key] || (flow && (() => choose(flow)));
  if (!act) return;
  event.preventDefault();
  act();
});

new ResizeObserver(() => diagrams.forEach((d) => d.resize())).observe(document.body);
const paper = (whole) => diagrams.forEach((d) => { d.whole = whole; d.paint(); });
window.addEventListener("beforeprint", () => paper(true));
window.addEventListener("afterprint", () => paper(false));
const first = active.rows.findIndex((row) => row.l !== undefined);
if (first >= 0) active.select(first, false);
active.scroll.scrollTop = 0;
