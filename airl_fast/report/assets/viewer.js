"use strict";

// One viewer of traces for each block of data. Only the trace that is shown and one page of the
// list are in the document. Text from outside goes in as text, never as markup.

const [PAGE, SHADES] = [20, 4]; // traces in the list at a time; shades on either side
// Control characters, those that reorder what follows, and halves of surrogate pairs, as in text.py.
const HIDDEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|\p{Cs}/gu;

const visible = (text) =>
  text.replace(HIDDEN, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

const ANSWERS = { true: ["✓", "correct"], false: ["✗", "wrong"], null: ["·", "not labelled"] };

function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.append(visible(text));
  made.append(...children);
  return made;
}

// Every line's end is drawn by the style sheet, so that a token of nothing else can be seen.
function written(text) {
  const lines = visible(text).split("\n");
  return lines.flatMap((line, i) => (i ? [element("i", { class: "nl" }), "\n", line] : [line]));
}

class Viewer {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector("script").textContent);
    this.traces = this.data.traces;
    this.measure = 0;
    this.level = "steps";
    this.trace = 0; // in this.traces
    this.order = []; // of the traces that the filter keeps
    this.units = []; // its steps or tokens
    this.unit = 0; // the active one
    this.list = this.find(".list");
    this.box = this.find(".steps");
    this.listen();
    this.fillFilters();
    this.fillSorts();
    root.hidden = false;
    this.arrange();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  listen() {
    const choose = (name, change) =>
      this.root.querySelectorAll(`input[name=${name}]`).forEach((radio) => {
        radio.name = `${this.root.id}-${name}`; // groups of their own where there are two viewers
        radio.addEventListener("change", () => change(radio.value));
      });
    choose("measure", (value) => {
      this.measure = this.data.measures.findIndex(([name]) => name === value);
      this.fillSorts();
      this.arrange();
    });
    choose("level", (value) => this.show(value, this.units[this.unit].step));
    for (const name of ["filter", "sort"])
      this.find(`[name=${name}]`).addEventListener("change", () => {
        this.arrange(name === "sort");
        this.say();
      });
    this.list.addEventListener("keydown", (event) => this.onListKey(event));
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest("[data-trace]");
      if (row) this.select(Number(row.dataset.trace));
    });
    this.box.addEventListener("keydown", (event) => this.onStepKey(event));
    this.box.addEventListener("click", (event) => this.pick(event, (i) => this.activate(i)));
    this.box.addEventListener("pointerover", (event) => this.pick(event, (i) => this.detail(i)));
    this.box.addEventListener("pointerleave", () => this.detail(this.unit));
    for (const button of this.root.querySelectorAll("[data-go]"))
      button.addEventListener("click", () => this.move(Number(button.dataset.go)));
    for (const button of this.root.querySelectorAll("[data-jump]"))
      button.addEventListener("click", () => {
        this.goToStep(this.traces[this.trace][button.dataset.jump]);
        this.box.focus();
      });
  }

  // What is listed, and in which order

  fillFilters() {
    const known = this.traces.some((t) => t.group !== "");
    const sources = [...new Set(this.traces.map((t) => t.source))].filter((name) => name !== "");
    this.filters = [
      ["all", () => true],
      ["correct", (t) => t.correct === true],
      ["wrong", (t) => t.correct === false],
      ["not labelled", (t) => t.correct === null],
      ["error located rightly", (t) => t.error !== null && t.error === t.located],
      ["error missed", (t) => t.error !== null && t.error !== t.located],
      ["error located where none is known", (t) => t.error === null && t.located !== null],
      ...sources.map((name) => [`from ${name}`, (t) => t.source === name]),
    ].map(([name, keep]) => [name, keep, this.traces.filter(keep).length]);
    const worth = this.filters.filter(([, , n], i) => !i || (n && n < this.traces.length));
    if (known) worth.push(["of the prompt shown", (t) => t.group === this.traces[this.trace].group]);
    this.filters = worth;
    this.find("[name=filter]").replaceChildren(
      ...worth.map(([name, , n], i) =>
        element("option", { value: i, text: n === undefined ? name : `${name} (${n})` }),
      ),
    );
  }

  fillSorts() {
    const m = this.measure;
    const label = this.data.measures[m][1];
    const lowest = (t) => Math.min(...t.steps.map(([values]) => values[m]));
    const whole = [
      [`lowest ${label} first`, (t) => t.values[m]],
      [`highest ${label} first`, (t) => -t.values[m]],
    ];
    this.sorts = [
      ["as given", () => 0],
      ...(this.traces.every((t) => t.values[m] !== null) ? whole : []),
      [`lowest step by ${label} first`, lowest],
      ["most steps first", (t) => -t.steps.length],
    ];
    const select = this.find("[name=sort]");
    const chosen = Math.max(0, select.selectedIndex);
    select.replaceChildren(...this.sorts.map(([name], i) => element("option", { value: i, text: name })));
    select.selectedIndex = chosen;
  }

  arrange(first = false) {
    const keep = this.filters[this.find("[name=filter]").value][1];
    const key = this.sorts[this.find("[name=sort]").value][1];
    const kept = this.traces.map((t, i) => [key(t), i]).filter(([, i]) => keep(this.traces[i]));
    this.order = kept.sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => i);
    const stays = !first && this.order.includes(this.trace);
    if (!stays) this.trace = this.order[0];
    this.showList();
    this.show(this.level, stays ? this.units[this.unit]?.step || 0 : 0);
  }

  // The list

  showList() {
    const at = this.order.indexOf(this.trace);
    const from = at - (at % PAGE);
    const rows = this.order.slice(from, from + PAGE).map((index, i) => this.row(index, from + i));
    this.list.replaceChildren(...rows);
    const row = this.list.querySelector("[aria-selected=true]");
    this.list.setAttribute("aria-activedescendant", row.id);
    const top = row.offsetTop - this.list.offsetTop; // scrolled without moving the page
    const { clientHeight: height, scrollTop } = this.list;
    if (top < scrollTop) this.list.scrollTop = top;
    if (top + row.offsetHeight > scrollTop + height)
      this.list.scrollTop = top + row.offsetHeight - height;
    this.find(".place").textContent = `${at + 1} of ${this.order.length}`;
    const [back, on] = this.root.querySelectorAll("[data-go]");
    back.disabled = at === 0;
    on.disabled = at === this.order.length - 1;
  }

  row(index, position) {
    const t = this.traces[index];
    const [mark, answer] = ANSWERS[t.correct];
    const total = t.values[this.measure];
    const [, label] = this.data.measures[this.measure];
    const value = total === null ? "" : `, ${label} ${this.number(total)}`;
    return element(
      "div",
      {
        role: "option",
        id: `${this.root.id}-trace-${index}`,
        "data-trace": index,
        "aria-selected": index === this.trace,
        "aria-posinset": position + 1,
        "aria-setsize": this.order.length,
        "aria-label": visible(`${index + 1}, ${t.title}, ${answer}${value}`),
      },
      element("span", { class: "answer", text: mark }),
      element("span", { class: "title", text: t.title }),
      element("span", { class: "total", text: total === null ? "" : this.number(total) }),
      element(
        "span",
        { class: "strip" },
        ...t.steps.map(([values]) => element("i", { class: this.shade(values, "steps") })),
      ),
    );
  }

  onListKey(event) {
    const at = this.order.indexOf(this.trace);
    const last = this.order.length - 1;
    const steps = { ArrowUp: -1, ArrowDown: 1, PageUp: -PAGE, PageDown: PAGE, Home: -at, End: last - at };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in steps) this.move(steps[event.key]);
    else if (event.key === "Enter" || event.key === "ArrowRight") this.box.focus();
    else return;
    event.preventDefault();
  }

  move(by) {
    const at = this.order.indexOf(this.trace) + by;
    this.select(this.order[Math.min(Math.max(at, 0), this.order.length - 1)]);
  }

  select(index) {
    this.trace = index;
    this.showList();
    this.show(this.level, 0);
    this.say();
  }

  // The trace

  show(level, step) {
    this.level = level;
    for (const radio of this.root.querySelectorAll(`input[name=${this.root.id}-level]`))
      radio.checked = radio.value === level;
    const t = this.traces[this.trace];
    this.find(".name").textContent = visible(`${this.trace + 1}. ${t.title}`);
    this.find(".facts").replaceChildren(...this.facts(t).map((text) => element("span", { text })));
    this.find(".prompt").hidden = t.prompt === "";
    this.find(".prompt pre").replaceChildren(...written(t.prompt));
    for (const button of this.root.querySelectorAll("[data-jump]"))
      button.hidden = t[button.dataset.jump] === null;
    this.showScale();
    this.units = [];
    this.box.replaceChildren(...t.steps.map((_, i) => this.step(t, i)));
    this.box.setAttribute("aria-label", level === "steps" ? "Steps" : "Tokens, by step");
    this.goToStep(step, false);
  }

  facts(t) {
    const tokens = t.steps.reduce((n, [, pieces]) => n + pieces.filter((p) => p.length > 1).length, 0);
    const size = `${t.steps.length} steps${tokens ? `, ${tokens} tokens` : ""}`;
    const facts = [ANSWERS[t.correct].join(" "), size];
    if (t.source) facts.push(`from ${t.source}`);
    this.data.measures.forEach(([, label], m) => {
      if (t.values[m] !== null) facts.push(`${label} ${this.number(t.values[m], m)}`);
    });
    if (t.located !== null) facts.push(`located error: step ${t.located + 1}`);
    if (t.error !== null) facts.push(`true error: step ${t.error + 1}`);
    return facts;
  }

  step(t, i) {
    const [values, tokens] = t.steps[i];
    const marks = this.marks(t, i);
    const whole = this.level === "steps" || tokens.every((token) => token.length === 1);
    const text = element("span", { class: "text", dir: "auto" });
    const row = element(
      "div",
      { class: "row" },
      element("span", { class: "no", text: `${i + 1}` }),
      text,
      element("span", { class: "value", text: this.number(values[this.measure]) }),
      element("span", { class: "marks" }, ...marks.map((name) => element("b", { text: name }))),
    );
    if (marks.includes("located error")) row.classList.add("located");
    if (marks.includes("true error")) row.classList.add("wrong");
    if (whole) {
      text.classList.add(this.shade(values, "steps"));
      text.append(...written(tokens.map(([piece]) => piece).join("")));
      this.unitOf(row, { step: i, values });
    } else {
      row.setAttribute("role", "group");
      row.setAttribute("aria-label", [`Step ${i + 1}`, ...marks].join(", "));
      tokens.forEach(([piece, ...read], j) => text.append(this.token(piece, read, i, j)));
    }
    return row;
  }

  token(piece, values, step, token) {
    if (values.length === 0) return element("span", {}, ...written(piece));
    const unit = element("span", { class: `token ${this.shade(values, "tokens")}` });
    if (piece === "") unit.classList.add("none");
    unit.append(...written(piece));
    this.unitOf(unit, { step, token, piece, values });
    return unit;
  }

  unitOf(node, place) {
    node.id = `${this.root.id}-unit-${this.units.length}`;
    node.dataset.unit = this.units.length;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", "false");
    this.units.push({ node, ...place });
    const shown = place.token === undefined ? `: ${node.querySelector(".text").textContent}` : "";
    node.setAttribute("aria-label", this.sentence(this.units.length - 1) + shown);
  }

  marks(t, i) {
    const marks = [];
    if (t.located === i) marks.push("located error");
    if (t.error === i) marks.push("true error");
    const column = t.steps.map(([values]) => values[this.measure]);
    if (t.steps.length > 1 && column.indexOf(Math.min(...column)) === i) marks.push("lowest");
    return marks;
  }

  sentence(i) {
    const { step, token, piece, values } = this.units[i];
    const t = this.traces[this.trace];
    const parts = [`Step ${step + 1} of ${t.steps.length}`];
    if (token !== undefined) {
      const text = `“${visible(piece).replaceAll("\n", "↵")}”`;
      parts.push(`token ${token + 1}: ${piece === "" ? "no characters of its own" : text}`);
    }
    this.data.measures.forEach(([, label], m) =>
      parts.push(`${label} ${this.number(values[m], m, token === undefined ? "steps" : "tokens")}`),
    );
    return [...parts, ...this.marks(t, step)].join(", ");
  }

  showScale() {
    const [centre, limit] = this.data.scales[this.level][this.measure];
    const [, label] = this.data.measures[this.measure];
    const shades = [];
    for (let k = -SHADES; k <= SHADES; k++) {
      const value = this.number(centre + (limit * k) / SHADES, this.measure, this.level);
      const bound = k === -SHADES ? "≤ " : k === SHADES ? "≥ " : "";
      shades.push(element("span", { class: shadeClass(k), text: bound + value }));
    }
    const scale = this.find(".scale");
    scale.replaceChildren(element("span", { class: "of", text: label }), ...shades);
    const [low, high] = [shades[0].textContent, shades.at(-1).textContent];
    scale.setAttribute("aria-label", `Colours: ${label}, orange ${low}, to blue ${high}`);
  }

  // The active step or token

  goToStep(step, scroll = true) {
    const at = this.units.findIndex((unit) => unit.step >= step);
    this.activate(at < 0 ? this.units.length - 1 : at, scroll);
  }

  activate(i, scroll = true) {
    this.units[this.unit]?.node.setAttribute("aria-selected", "false");
    this.unit = i;
    const { node } = this.units[i];
    node.setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", node.id);
    if (scroll) node.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.detail(i);
  }

  pick(event, act) {
    const node = event.target.closest("[data-unit]");
    if (node) act(Number(node.dataset.unit));
  }

  detail(i) {
    this.find(".detail").textContent = this.sentence(i);
  }

  onStepKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { step } = this.units[this.unit];
    const last = this.units.length - 1;
    const start = this.units.findIndex((unit) => unit.step === step);
    const other = this.level === "steps" && this.data.scales.tokens ? "tokens" : "steps";
    const act = {
      ArrowLeft: () => this.activate(Math.max(0, this.unit - 1)),
      ArrowRight: () => this.activate(Math.min(last, this.unit + 1)),
      ArrowUp: () => this.goToStep(this.units[Math.max(0, start - 1)].step),
      ArrowDown: () => this.goToStep(step + 1),
      Home: () => this.activate(0),
      End: () => this.activate(last),
      PageUp: () => this.move(-1),
      PageDown: () => this.move(1),
      Enter: () => this.show(other, step),
      Escape: () => (this.level === "tokens" ? this.show("steps", step) : this.list.focus()),
    }[event.key];
    if (!act) return;
    act();
    event.preventDefault();
  }

  say() {
    const t = this.traces[this.trace];
    const at = `Trace ${this.order.indexOf(this.trace) + 1} of ${this.order.length}`;
    this.find("[role=status]").textContent = visible([at, t.title, ...this.facts(t)].join(", "));
  }

  number(value, m = this.measure, level = "steps") {
    return value.toFixed(this.data.scales[level][m][2]);
  }

  shade(values, level) {
    const [centre, limit] = this.data.scales[level][this.measure];
    const share = Math.max(-1, Math.min(1, (values[this.measure] - centre) / limit));
    return shadeClass(Math.floor(share * SHADES + 0.5));
  }
}

const shadeClass = (k) => (k < 0 ? `n${-k}` : k > 0 ? `p${k}` : "z");

for (const root of document.querySelectorAll(".viewer")) new Viewer(root);
