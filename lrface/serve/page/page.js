"use strict";

const SIDES = ["first", "second"];
const chosen = { first: null, second: null };  // the files, in this page's memory only
const faces = { first: null, second: null };   // what the server said of each
let sizes = [];                                // pixels, largest first, as in every answer
let pair = null;
let running = null;
let token = "";

const $ = (selector, within = document) => within.querySelector(selector);
const section = (side) => document.getElementById(side);

function say(message) {
  const place = $("#message");
  place.textContent = message;
  place.hidden = !message;
}

function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function asked(path, options) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response.json();
  let found;
  try {
    found = await response.json();
  } catch {
    found = { message: `the server answered ${response.status}` };
  }
  if (response.status === 401) {
    $("#token-form").hidden = false;
    $("#token").focus();
  }
  throw new Error(found.message);
}

async function introduce() {
  try {
    const about = await asked("about", {});
    $("#model").textContent = `Model ${about.model}, ${about.embedding_size} numbers a face, lrface ${about.lrface}`;
    $("#token-form").hidden = true;
    say("");
    return true;
  } catch (error) {
    say(`Not ready: ${error.message}`);
    return false;
  }
}

// ------------------------------------------------------------------------------------------------- asking

async function compare(undo = () => {}) {
  if (running) running.abort();
  const before = pair;
  const sides = SIDES.filter((side) => chosen[side]);
  pair = null;
  for (const side of SIDES) if (!chosen[side]) faces[side] = null;
  if (!sides.length) {
    show();
    return;
  }
  const mine = new AbortController();
  running = mine;
  const form = new FormData();
  // One photograph alone is the form's first. Its name stays here.
  sides.forEach((side, at) => form.append(SIDES[at], chosen[side], "photograph"));
  document.body.setAttribute("aria-busy", "true");
  verdict("Looking at the faces …", "waiting");
  try {
    const answer = await asked("page/compare", { method: "POST", body: form, signal: mine.signal });
    const first = !sizes.length;
    sizes = answer.sizes;
    sides.forEach((side, at) => { faces[side] = answer[SIDES[at]]; });
    pair = answer.pair;
    if (first) prepareSliders();
    $("#no-reconstruction").hidden = !answer.no_reconstruction;
    $("#no-reconstruction").textContent = answer.no_reconstruction
      ? `No reconstructions: ${answer.no_reconstruction}` : "";
    say("");
  } catch (error) {
    if (error.name === "AbortError") return;
    undo();  // what was shown before stays
    pair = before;
    say(error.message);
  } finally {
    if (running === mine) {
      running = null;
      document.body.removeAttribute("aria-busy");
    }
  }
  show();
}

function take(side, file) {
  if (!file) return;
  const before = chosen[side];
  chosen[side] = file;
  compare(() => { chosen[side] = before; });
}

// ------------------------------------------------------------------------------------------------ sliders

function prepareSliders() {
  for (const side of SIDES) {
    const slider = $("input[type=range]", section(side));
    slider.min = 0;
    slider.max = sizes.length - 1;
    slider.value = slider.max;
  }
}

// Right is more pixels; answers begin with the most.
function at(side) {
  return sizes.length - 1 - Number($("input[type=range]", section(side)).value);
}

// ------------------------------------------------------------------------------------------------ showing

function show() {
  for (const side of SIDES) showFace(side);
  showVerdict();
  showCurve();
}

function showFace(side) {
  const place = section(side);
  const face = faces[side];
  place.classList.toggle("filled", Boolean(face));
  $(".drop b", place).textContent = face ? "Drop another photograph here" : "Drop a photograph here";
  $(".remove", place).hidden = !chosen[side];
  for (const part of [".views", ".slide", ".detail"]) $(part, place).hidden = !face;
  if (!face) return;
  const size = sizes[at(side)];
  const crop = $(".crop", place);
  crop.src = face.crops[at(side)];
  crop.alt = `${side} face, aligned, at ${size} pixels`;
  const drawn = Boolean(face.reconstructions);
  $(".drawn", place).hidden = !drawn;
  $(".views", place).classList.toggle("alone", !drawn);
  if (drawn) {
    $(".reconstruction", place).src = face.reconstructions[at(side)];
    $(".reconstruction", place).alt = `what the decoder draws of the ${side} face at ${size} pixels`;
  }
  $("output", place).textContent = `${size} px`;
  $("input[type=range]", place).setAttribute("aria-valuetext", `${size} pixels`);
  const found = face.score === null ? "it was taken as an aligned crop" : `the face was found with score ${face.score.toFixed(2)}`;
  $(".detail", place).textContent =
    `The photograph has about ${Math.round(face.effective_resolution)} pixels of detail across the face; ${found}.`;
}

function verdict(text, kind) {
  const place = $("#verdict");
  place.textContent = text;
  place.className = kind;
}

function showVerdict() {
  for (const part of ["#scale", "#basis"]) $(part).hidden = !pair;
  if (!pair) {
    const missing = SIDES.filter((side) => !faces[side]);
    verdict(missing.length === 2 ? "Two photographs are needed." : "A second photograph is needed.", "waiting");
    return;
  }
  const [i, j] = [at("first"), at("second")];
  const [similarity, threshold] = [pair.similarity[i][j], pair.threshold[i][j]];
  const same = pair.same_person[i][j];
  verdict(same ? "Same person" : "Different people", same ? "same" : "different");
  $(".reached").style.width = `${100 * Math.max(0, similarity)}%`;
  $(".needed").style.left = `${100 * Math.max(0, threshold)}%`;
  $("#similarity").textContent = similarity.toFixed(3);
  $("#threshold").textContent = threshold.toFixed(3);
  $("#probability").textContent = pair.probability ? percent(pair.probability[i][j]) : "not calibrated";
  $("#basis").textContent = {
    card: `The threshold was measured for this model, for the less clear of the two faces (${sizes[i]} and ${sizes[j]} pixels).`,
    given: "The threshold was given.",
    default: "The threshold is a general one, not measured for this model: run lrface calibrate to measure its own.",
  }[pair.threshold_from];
}

function percent(share) {
  if (share > 0.999) return "> 99.9 %";
  if (share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

// -------------------------------------------------------------------------------------------------- curve

const HEIGHT = 330, LEFT = 40, RIGHT = 16, TOP = 14, BOTTOM = 42;

function drawn(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function showCurve() {
  $("#curve-panel").hidden = !pair;
  if (!pair) return;
  const [i, j] = [at("first"), at("second")];
  const values = pair.similarity;
  const WIDTH = Math.max(280, $("#curve").clientWidth);  // letters keep their size on a telephone
  const lowest = Math.min(0, Math.floor(10 * Math.min(...values.flat())) / 10);
  const [low, high] = [Math.log(sizes[sizes.length - 1]), Math.log(sizes[0])];
  const x = (size) => LEFT + ((Math.log(size) - low) / (high - low)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((1 - value) / (1 - lowest)) * (HEIGHT - TOP - BOTTOM);
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-labelledby": "curve-label" });
  svg.append(drawn("title", { id: "curve-label" },
    `Similarity of the two faces from ${sizes[sizes.length - 1]} to ${sizes[0]} pixels; the figures are in the table below`));

  for (let tick = Math.ceil(lowest * 5) / 5; tick <= 1.001; tick += 0.2) {
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(drawn("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, Math.abs(tick).toFixed(1)));
    if (tick < -0.001) svg.lastChild.textContent = tick.toFixed(1);
  }
  const every = WIDTH < 500 ? 4 : 2;
  for (const size of sizes.filter((_, number) => number % every === 0 || number === sizes.length - 1)) {
    svg.append(drawn("line", { class: "grid", x1: x(size), x2: x(size), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 5 }));
    svg.append(drawn("text", { x: x(size), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, size));
  }
  svg.append(drawn("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "pixels of a side"));
  for (const side of SIDES) {
    const detail = faces[side].effective_resolution;
    if (detail < sizes[0] && detail > sizes[sizes.length - 1]) {
      const line = drawn("line", { class: "known", x1: x(detail), x2: x(detail), y1: TOP, y2: HEIGHT - BOTTOM });
      line.append(drawn("title", {}, `The ${side} photograph has no more detail than ${Math.round(detail)} pixels`));
      svg.append(line);
    }
  }

  const line = (kind, value) => svg.append(drawn("polyline", {
    class: `line ${kind}`,
    points: sizes.map((size, number) => `${x(size).toFixed(1)},${y(value(number)).toFixed(1)}`).join(" "),
  }));
  line("limit", (number) => pair.threshold[number][number]);
  line("both", (number) => values[number][number]);
  line("second", (number) => values[i][number]);
  line("first", (number) => values[number][j]);
  svg.append(drawn("circle", { class: "second", cx: x(sizes[j]), cy: y(values[i][j]), r: 6 }));
  svg.append(drawn("circle", { class: "first", cx: x(sizes[i]), cy: y(values[i][j]), r: 6 }));
  $("#curve").replaceChildren(svg);
  $("#first-stays").textContent = `${sizes[i]} px`;
  $("#second-stays").textContent = `${sizes[j]} px`;
  showTable(i, j);
}

function showTable(i, j) {
  const row = (cells, kind) => {
    const made = document.createElement("tr");
    for (const cell of cells) {
      const each = document.createElement(kind);
      each.textContent = cell;
      made.append(each);
    }
    return made;
  };
  const heads = ["pixels", "both", `first at ${sizes[i]}`, `second at ${sizes[j]}`, "threshold"];
  $("#figures").replaceChildren(row(heads, "th"), ...sizes.map((size, n) => row([
    size,
    ...[pair.similarity[n][n], pair.similarity[i][n], pair.similarity[n][j], pair.threshold[n][n]].map((v) => v.toFixed(3)),
  ], "td")));
}

// ------------------------------------------------------------------------------------------------- events

for (const side of SIDES) {
  const place = section(side);
  const input = $("input[type=file]", place);
  input.addEventListener("change", () => { take(side, input.files[0]); input.value = ""; });
  $("input[type=range]", place).addEventListener("input", () => { if (faces[side]) show(); });
  $(".remove", place).addEventListener("click", () => { chosen[side] = null; input.focus(); compare(); });
  place.addEventListener("dragover", (event) => { event.preventDefault(); place.classList.add("over"); });
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    take(side, event.dataTransfer.files[0]);
  });
}
// A photograph dropped beside its place must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
$("#token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = $("#token").value.trim();
  $("#token").value = "";
  if (await introduce()) compare();
});
window.addEventListener("resize", showCurve);
introduce();
