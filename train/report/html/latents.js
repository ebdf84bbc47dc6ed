"use strict";
// The latent browser. A learner's latents are parsed when they are first looked at, rows and details made when seen.

const ROW = 34;  // pixels, as in the style sheet
const SORTS = {
  density: [latent => latent.density, -1], max: [latent => latent.max, -1], mean: [latent => latent.mean, -1],
  index: [latent => latent.index, 1],
};
const blocks = new Map([...document.querySelectorAll("script.latents-data")].map(block => [block.dataset.learner, block]));
const parsed = new Map();

function latentsOf(label) {
  if (!parsed.has(label)) {
    const found = JSON.parse(blocks.get(label).textContent);
    const latents = found.latents.map(([index, group, density, mean, max, histogram, neighbours, promoted, suppressed, contexts]) =>
      ({learner: label, texts: found.texts, index, group, density, mean, max, histogram, neighbours, promoted, suppressed, contexts}));
    parsed.set(label, {latents, reasons: found.reasons, byIndex: new Map(latents.map(latent => [latent.index, latent]))});
  }
  return parsed.get(label);
}

function visible(text) {  // a token as it is shown: line breaks and tabs as signs, spaces seen where there is nothing else
  const signs = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  if (signs.trim()) return signs;
  return signs.length > 3 ? `␣×${signs.length}` : "␣".repeat(signs.length);
}

const alone = text => visible(text).replace(/^ /, "␣");  // a token by itself: the space before it is seen

function peakToken(latent) {  // the commonest token of its peaks, the strongest of equals
  const counts = new Map();
  for (const [, , peak, tokens] of latent.contexts) counts.set(tokens[peak], (counts.get(tokens[peak]) ?? 0) + 1);
  const best = [...counts].sort((a, b) => b[1] - a[1])[0];
  return best === undefined ? "" : latent.texts[best[0]];
}

function haystack(latent) {  // what a search looks at: tokens it is active on and promotes
  if (latent.haystack === undefined) {
    const words = new Set();
    for (const [, , , tokens, pairs] of latent.contexts)
      for (let n = 0; n < pairs.length; n += 2) words.add(latent.texts[tokens[pairs[n]]]);
    for (const [token] of latent.promoted ?? []) words.add(token);
    latent.haystack = [...words].join("\n").toLowerCase();
  }
  return latent.haystack;
}

function matches(latent, query) {
  const bare = query.trim().toLowerCase();
  if (!bare) return true;
  const number = bare.replace(/^#/, "");
  return String(latent.index) === number || (latent.group ?? "").toLowerCase().includes(bare)
    || haystack(latent).includes(bare === number ? query.toLowerCase() : bare);
}

const percent = share => `${short(Number((100 * share).toPrecision(3)))} %`;
const learnerOf = label => LEARNERS.find(learner => learner.label === label);

function histogram(latent) {
  const [low, high, counts] = latent.histogram;
  const width = 240, height = 70, most = Math.max(...counts, 1), bar = width / counts.length;
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height + 16}`, role: "img",
    "aria-label": `Histogram of activations from ${short(low)} to ${short(high)}`});
  counts.forEach((count, n) => svg.append(draw("rect",
    {x: n * bar + .5, width: bar - 1, y: height - height * count / most, height: height * count / most},
    draw("title", {}, `${count} tokens`))));
  svg.append(draw("text", {x: 0, y: height + 13}, short(low)), draw("text", {x: width / 2, y: height + 13, "text-anchor": "middle"}, "activation, log"),
    draw("text", {x: width, y: height + 13, "text-anchor": "end"}, short(high)));
  return svg;
}

function effects(title, pairs, reason) {
  const most = Math.max(...(pairs ?? []).map(([, logit]) => Math.abs(logit)), 1e-9);
  const list = pairs ? make("ul", {class: "effects"}, ...pairs.map(([token, logit]) =>
    make("li", {"--v": Math.abs(logit) / most, title: JSON.stringify(token)}, make("span", {class: "token"}, alone(token)), make("span", {}, short(logit)))))
    : make("p", {class: "empty"}, reason ?? "not known");
  return make("div", {}, make("h4", {}, title), list);
}

function contextLine(latent, [doc, activation, peak, tokens, pairs]) {
  const values = new Map();
  for (let n = 0; n < pairs.length; n += 2) values.set(pairs[n], pairs[n + 1]);
  const text = make("div", {class: "text token"});
  tokens.forEach((token, place) => {
    const value = values.get(place) ?? 0, raw = latent.texts[token], shown = visible(raw);
    const kind = [value > 0 ? "on" : "", place === peak ? "peak" : ""].join(" ").trim();
    const part = make("span", {class: kind || null, "--v": Math.min(value / latent.max, 1), title: `${JSON.stringify(raw)} ${short(value)}`}, shown);
    text.append(part, raw.endsWith("\n") ? document.createElement("wbr") : "");
  });
  return make("li", {}, make("div", {class: "meta"}, make("b", {}, short(activation)), `doc ${doc}`), text);
}

function decoded(text) {  // null for what is no encoded text: an address may be mistyped
  try { return decodeURIComponent(text); } catch { return null; }
}

class Browser {
  constructor(place) {
    const labels = [...blocks.keys()];
    const again = () => this.filter();
    this.learner = choice([...labels.map(label => [label, label]), ...(labels.length > 1 ? [["", "all learners"]] : [])], () => this.load());
    this.group = choice([], again);
    this.sort = choice(Object.keys(SORTS).map(name => [name, name]), () => { this.direction = SORTS[this.sort.value][1]; again(); });
    this.direction = SORTS[this.sort.value][1];
    this.turn = button("", () => { this.direction = -this.direction; again(); });
    this.query = make("input", {type: "search", oninput: again, placeholder: "token, index or group", autocomplete: "off", spellcheck: "false"});
    this.count = make("p", {class: "hint", role: "status"});
    this.rows = make("div", {onclick: event => this.press(event)});
    this.list = make("div", {class: "list", role: "listbox", tabindex: "0", "aria-label": "Latents",
      onscroll: () => this.showRows(false), onkeydown: event => this.key(event)}, this.rows);
    this.detail = make("article", {class: "detail", "aria-live": "polite"});
    const label = (text, control, kind = null) => make("label", {class: kind}, text, control);
    place.append(
      make("form", {class: "controls", onsubmit: event => event.preventDefault()}, label("learner", this.learner), label("group", this.group),
        label("search", this.query, "wide"), label("sort by", this.sort), this.turn),
      this.count, make("div", {class: "browser"}, this.list, this.detail));
    this.groupLabel = this.group.parentElement;
    new ResizeObserver(() => this.showRows(false)).observe(this.list);
    window.addEventListener("hashchange", () => this.follow());
    this.load();
    this.follow();
  }

  load() {
    const labels = this.learner.value ? [this.learner.value] : [...blocks.keys()];
    this.all = labels.flatMap(label => latentsOf(label).latents);
    const groups = [...new Set(this.all.map(latent => latent.group))].filter(group => group !== null);
    this.group.replaceChildren(make("option", {value: ""}, "all"), ...groups.map(group => make("option", {value: group}, group)));
    this.groupLabel.hidden = !groups.length;
    this.filter();
  }

  filter() {
    const by = SORTS[this.sort.value][0], query = this.query.value, group = this.group.value;
    this.found = this.all.filter(latent => (!group || latent.group === group) && matches(latent, query));
    this.found.sort((a, b) => this.direction * (by(a) - by(b)) || a.index - b.index);
    this.turn.textContent = this.direction < 0 ? "↓ falling" : "↑ rising";
    this.count.textContent = `${this.found.length} of ${this.all.length} latents`;
    this.rows.style.height = `${this.found.length * ROW}px`;
    this.list.scrollTop = 0;
    if (!this.found.includes(this.chosen)) this.choose(this.found[0] ?? null);
    else this.showRows();
  }

  showRows(changed = true) {  // those in sight, and a few more; made again only where others are in sight or they changed
    const first = Math.max(Math.floor(this.list.scrollTop / ROW) - 5, 0);
    const last = Math.min(first + Math.ceil(this.list.clientHeight / ROW) + 10, this.found.length);
    if (!changed && first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const rows = [];
    for (let place = first; place < last; place++) rows.push(this.row(this.found[place], place));
    this.rows.replaceChildren(...rows);
    if (!this.found.length) this.rows.replaceChildren(make("p", {class: "empty"}, "No latent like this."));
    const at = this.found.indexOf(this.chosen);
    if (at >= first && at < last) this.list.setAttribute("aria-activedescendant", `latent-${at}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(latent, place) {
    const figure = this.sort.value === "max" || this.sort.value === "mean" ? short(latent[this.sort.value]) : percent(latent.density);
    const chip = latent.group ?? "";
    const name = make("span", {}, ...(this.learner.value ? [] : [make("i", {class: "swatch", "--c": learnerOf(latent.learner).colour})]), String(latent.index));
    return make("div", {class: "row", style: `top: ${place * ROW}px`, role: "option", id: `latent-${place}`, "aria-selected": String(latent === this.chosen),
      "aria-posinset": place + 1, "aria-setsize": this.found.length, title: this.learner.value ? null : latent.learner},
      name, make("span", {class: "token"}, alone(peakToken(latent))), chip ? make("span", {class: "chip"}, chip) : make("span"),
      make("span", {class: "figure"}, figure));
  }

  press(event) {  // by place: a row may be made anew between a button's going down and up
    const latent = this.found[Math.floor((event.clientY - this.rows.getBoundingClientRect().top) / ROW)];
    if (latent) this.choose(latent, false);
  }

  key(event) {
    const page = Math.max(Math.floor(this.list.clientHeight / ROW) - 1, 1);
    const moves = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity};
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.move(moves[event.key]);
  }

  move(by) {
    const at = Math.min(Math.max(this.found.indexOf(this.chosen) + by, 0), this.found.length - 1);
    if (this.found[at]) this.choose(this.found[at]);
  }

  choose(latent, scroll = true) {
    this.chosen = latent;
    const at = this.found.indexOf(latent);
    if (scroll && at >= 0) {
      if (at * ROW < this.list.scrollTop) this.list.scrollTop = at * ROW;
      else if ((at + 1) * ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = (at + 1) * ROW - this.list.clientHeight;
    }
    this.showRows();
    this.detail.replaceChildren(...(latent ? this.describe(latent) : []));
  }

  describe(latent) {
    const {reasons, byIndex} = latentsOf(latent.learner);
    const near = latent.neighbours.map(([index, cosine]) => {
      const other = byIndex.get(index);
      return button(`${index}  ${cosine.toFixed(2)}`, () => this.jump(other),
        {disabled: !other, title: other ? alone(peakToken(other)) : "not in this file's sample"});
    });
    return [
      make("div", {class: "heading"}, make("i", {class: "swatch", "--c": learnerOf(latent.learner).colour}), make("h3", {}, `Latent ${latent.index}`),
        make("span", {class: "chip"}, latent.learner), latent.group === null ? null : make("span", {class: "chip"}, latent.group),
        make("a", {href: this.address(latent), title: "address of this latent"}, "link"),
        make("span", {class: "steps"}, button("← previous", () => this.move(-1)), button("next →", () => this.move(1)))),
      make("div", {class: "panels"},
        make("div", {}, make("h4", {}, `active on ${percent(latent.density)} of tokens`), histogram(latent),
          make("small", {}, `mean ${short(latent.mean)}, largest ${short(latent.max)}`)),
        effects("promotes", latent.promoted, reasons.promoted), effects("suppresses", latent.suppressed, reasons.promoted)),
      make("h4", {}, "nearest decoder rows (cosine)"),
      near.length ? make("div", {class: "neighbours"}, ...near) : make("p", {class: "empty"}, "none"),
      make("h4", {style: "margin-top: 1rem"}, "strongest contexts, one in each document"),
      reasons.text ? make("p", {class: "empty"}, `Tokens as ids: ${reasons.text}`) : null,
      make("ol", {class: "contexts"}, ...latent.contexts.map(context => contextLine(latent, context))),
    ].filter(part => part !== null);
  }

  jump(latent) {  // to a latent that the filters may hide
    if (this.learner.value && this.learner.value !== latent.learner) { this.learner.value = latent.learner; this.load(); }
    if (!this.found.includes(latent)) { this.query.value = ""; this.group.value = ""; this.filter(); }
    this.choose(latent);
  }

  address(latent) {
    return `#latent=${encodeURIComponent(latent.learner)}/${latent.index}`;
  }

  follow() {  // #latent=learner/12
    const found = /^#latent=([^/]+)\/(\d+)$/.exec(location.hash);
    const label = found && decoded(found[1]);
    const latent = label && blocks.has(label) ? latentsOf(label).byIndex.get(Number(found[2])) : undefined;
    if (!latent) return;
    this.jump(latent);
    this.list.scrollIntoView({block: "nearest"});
  }
}

const place = document.getElementById("browser");
if (place) new Browser(place);
