"use strict";
// Training curves: four charts, one of any logged figure, one of the parts of a learner's loss.

const DASHES = {solid: null, dashed: "6 3", dotted: "1.5 2.5", dashdot: "7 3 1.5 3"};
const PART_HUES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
const MARGIN = {left: 46, right: 16, top: 8, bottom: 24};
const HEIGHT = 210;
const hidden = new Set();  // learners switched off in the legend
const charts = [];

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}

// Lines but those whose middle is next to nothing: the identity's losses are 0 but for rounding.
function notNothing(lines) {
  const middle = values => quantile([...values].sort((a, b) => a - b), .5);
  const filled = lines.filter(values => values.length);
  const least = middle(filled.map(middle)) / 1000;
  return filled.filter(values => middle(values) >= least);
}

// The range of nearly all values. The first steps of a run or a learner that blew up would flatten all the others.
function rangeOf(series, log) {
  const sound = series.filter(line => !line.ended);
  const lines = (sound.length ? sound : series).map(line => line.y.filter(y => y !== null && (!log || y > 0)));
  const values = (log ? notNothing(lines) : lines).flat();
  if (!values.length) return null;
  values.sort((a, b) => a - b);
  let [low, high] = [values[0], values[values.length - 1]];
  const [inner, outer] = [quantile(values, .02), quantile(values, .98)];
  if (!log && high - outer > 1.5 * (outer - inner)) high = outer + .1 * (outer - inner);
  if (!log && inner - low > 1.5 * (outer - inner)) low = inner - .1 * (outer - inner);
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) / 2 || .5), high + (Math.abs(high) / 2 || .5)];
  return [low, high];
}

function ticksOf([low, high], log, most = 5) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 2, 5]) if (digit * 10 ** power >= low && digit * 10 ** power <= high) found.push(digit * 10 ** power);
    if (found.length <= most + 2) return found;
    const tens = found.filter(tick => Number.isInteger(Math.log10(tick)));
    return tens.filter((_, n) => n % Math.ceil(tens.length / (most + 2)) === 0);
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) found.push(n * step);
  return found;
}

class Chart {
  // series(): [{label, colour, dash, ended, x: […], y: […]}, …]
  constructor(title, series, {head = [], log = false} = {}) {
    this.series = series;
    this.box = make("input", {type: "checkbox", onchange: () => this.redraw()});
    this.box.checked = log;
    this.place = make("div");
    this.tip = make("div", {class: "tip", hidden: true});
    this.element = make("figure", {class: "chart", style: "margin: 0"},
      make("header", {}, make("h3", {}, title), ...head, make("label", {}, this.box, " log")), this.place, this.tip);
    this.title = title;
    charts.push(this);
  }

  redraw() {
    this.tip.hidden = true;
    const log = this.box.checked;
    const series = this.series().filter(line => line.y.some(y => y !== null && (!log || y > 0)));
    const range = rangeOf(series, log);
    if (!range) {
      this.place.replaceChildren(make("p", {class: "empty"}, "nothing was logged"));
      return;
    }
    const width = Math.max(this.element.clientWidth - 26, 200);
    const last = Math.max(...series.flatMap(line => line.x)), first = Math.min(0, ...series.flatMap(line => line.x));
    const y = log ? Math.log : value => value;
    const right = value => MARGIN.left + (value - first) / (last - first || 1) * (width - MARGIN.left - MARGIN.right);
    const up = value => HEIGHT - MARGIN.bottom
      - (y(value) - y(range[0])) / (y(range[1]) - y(range[0])) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const name = `clip${charts.indexOf(this)}`;
    const svg = draw("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img",
      "aria-label": `${this.title} against steps, ${series.length} lines`});
    svg.append(draw("clipPath", {id: name}, draw("rect",
      {x: MARGIN.left, y: MARGIN.top - 2, width: width - MARGIN.left - MARGIN.right + 2, height: HEIGHT - MARGIN.top - MARGIN.bottom + 4})));
    for (const tick of ticksOf(range, log)) svg.append(
      draw("line", {class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: up(tick), y2: up(tick)}),
      draw("text", {x: MARGIN.left - 6, y: up(tick) + 4, "text-anchor": "end"}, short(Number(tick.toPrecision(10)))));
    for (const tick of ticksOf([first, last], false, width > 350 ? 5 : 3)) svg.append(
      draw("text", {x: right(tick), y: HEIGHT - 8, "text-anchor": "middle"}, tick >= 10000 ? `${tick / 1000}k` : String(tick)));
    const lines = draw("g", {"clip-path": `url(#${name})`});
    const points = [];
    for (const line of series) {
      let path = "", pen = false;
      line.x.forEach((step, n) => {
        const value = line.y[n];
        if (value === null || (log && value <= 0)) { pen = false; return; }
        const at = [right(step), up(value)];
        path += `${pen ? "L" : "M"}${at[0].toFixed(1)} ${at[1].toFixed(1)}`;
        pen = true;
        points.push({at, line, step, value});
      });
      line.element = draw("path", {class: "series", d: path, "--c": line.colour, "stroke-dasharray": DASHES[line.dash] ?? null});
      lines.append(line.element);
      if (points.length && line.x.length === 1) lines.append(draw("circle",
        {class: "dot", cx: points[points.length - 1].at[0], cy: points[points.length - 1].at[1], r: 2.5, "--c": line.colour}));
    }
    this.cursor = draw("line", {class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden"});
    svg.append(lines, this.cursor);
    svg.addEventListener("pointermove", event => this.point(event, svg, points, series, width));
    svg.addEventListener("pointerleave", () => this.point(null, svg, points, series, width));
    this.place.replaceChildren(svg);
  }

  point(event, svg, points, series, width) {  // name the nearest point
    for (const line of series) line.element.classList.remove("near");
    this.tip.hidden = !event;
    this.cursor.setAttribute("visibility", event ? "visible" : "hidden");
    if (!event) return;
    const frame = svg.getBoundingClientRect();
    const at = [(event.clientX - frame.left) * width / frame.width, event.clientY - frame.top];
    const far = point => Math.hypot(point.at[0] - at[0], (point.at[1] - at[1]) / 2);
    const nearest = points.reduce((best, point) => far(point) < far(best) ? point : best);
    nearest.line.element.classList.add("near");
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, nearest.at[0]);
    this.tip.textContent = `${nearest.line.label} · step ${nearest.step} · ${short(nearest.value)}`;
    this.tip.style.top = "2.6rem";
    this.tip.style[at[0] > width / 2 ? "left" : "right"] = ".8rem";
    this.tip.style[at[0] > width / 2 ? "right" : "left"] = "auto";
  }
}

function curvesOf(key) {
  return LEARNERS.filter(learner => !hidden.has(learner.label) && learner.curves[key]).map(learner =>
    ({label: learner.label, colour: learner.colour, dash: learner.dash, ended: learner.ended,
      x: learner.curves.step, y: learner.curves[key]}));
}

function partsOf(label) {
  const learner = LEARNERS.find(one => one.label === label);
  return Object.keys(learner.curves).filter(key => key.startsWith("loss_")).map((key, n) =>
    ({label: key.slice(5).replaceAll("_", " "), colour: PART_HUES[n % PART_HUES.length],
      dash: Object.keys(DASHES)[Math.floor(n / PART_HUES.length) % 4], ended: false, x: learner.curves.step, y: learner.curves[key]}));
}

function sample(line) {  // of a line, for a legend
  return draw("svg", {viewBox: "0 0 22 10", "aria-hidden": "true"}, draw("path",
    {class: "series", d: "M0 5H22", "--c": line.colour, "stroke-dasharray": DASHES[line.dash] ?? null}));
}

function redrawAll() {
  for (const chart of charts) chart.redraw();
}

function legend() {
  const press = event => {
    const label = event.currentTarget.dataset.label;
    if (!hidden.delete(label)) hidden.add(label);
    show();
  };
  const buttons = LEARNERS.filter(learner => learner.curves.step).map(learner =>
    make("button", {type: "button", class: "plain", onclick: press, "data-label": learner.label, "aria-pressed": "true"},
      sample(learner), learner.label));
  const show = () => {
    for (const one of buttons) one.setAttribute("aria-pressed", String(!hidden.has(one.dataset.label)));
    redrawAll();
  };
  const all = on => () => {
    for (const one of buttons) on ? hidden.delete(one.dataset.label) : hidden.add(one.dataset.label);
    show();
  };
  const many = buttons.length > 3 ? [button("all", all(true)), button("none", all(false))] : [];
  return make("div", {class: "legend", role: "group", "aria-label": "Learners shown"}, ...many, ...buttons);
}

function training(place) {
  const drawn = LEARNERS.filter(learner => learner.curves.step);
  if (!drawn.length) {
    place.append(make("p", {class: "empty"}, "No step has been logged yet."));
    return;
  }
  const keys = [...new Set(drawn.flatMap(learner => Object.keys(learner.curves)))].filter(key => key !== "step").sort();
  const any = choice(keys.map(key => [key, key.replaceAll("_", " ")]), redrawAll);
  any.setAttribute("aria-label", "Logged figure");
  any.value = keys.includes("grad_norm") ? "grad_norm" : keys[0];
  const whose = choice(drawn.map(learner => [learner.label, learner.label]), redrawAll);
  whose.setAttribute("aria-label", "Learner");
  const parts = new Chart("parts of the loss", () => partsOf(whose.value), {head: [whose], log: true});
  const partsLegend = make("div", {class: "legend"});
  parts.element.append(partsLegend);
  const names = () => partsLegend.replaceChildren(...partsOf(whose.value).map(line =>
    make("span", {class: "chip"}, sample(line), line.label)));
  whose.addEventListener("change", names);
  const shown = [
    new Chart("explained variance", () => curvesOf("explained_variance")),
    new Chart("total loss", () => curvesOf("loss"), {log: true}),
    new Chart("L0, active latents a token", () => curvesOf("l0")),
    new Chart("share of dead latents", () => curvesOf("dead")),
    parts,
    new Chart("any figure", () => curvesOf(any.value), {head: [any]}),
  ];
  place.append(legend(), make("div", {class: "charts"}, ...shown.map(chart => chart.element)));
  names();
  redrawAll();
  let wide = place.clientWidth;
  new ResizeObserver(() => {
    if (place.clientWidth !== wide) { wide = place.clientWidth; redrawAll(); }
  }).observe(place);
}

training(document.getElementById("charts"));
