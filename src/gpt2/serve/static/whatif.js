// What if: parts of the model switched off, a steering vector, and activations of another text.

import { requestJson } from "./api.js";
import { drawBars } from "./bars.js";
import { addArrowKeys, button, el, quiet, section } from "./dom.js";
import { headName } from "./heads.js";
import { runLatestAndReport } from "./notice.js";
import { patchSection } from "./patching.js";
import { state } from "./state.js";
import { subject } from "./subject.js";

const PAUSE = 200; // ms after the last change
const off = { heads: new Set(), mlps: new Set(), mode: "zero" }; // "layer.head", and layers
const steering = { plus: "", minus: "", layer: 1, strength: 4 };

// The bars of the next token after an experiment, with ticks for the probabilities before it.
function drawOutcome(box, { tokens, kl }, about) {
  const list = el("ol", { className: "bars", "aria-label": "Next tokens after the change" });
  drawBars(list, tokens, null, about.token.id);
  box.replaceChildren(list, quiet(`The bar is the probability with the change, the tick without it. The distributions differ by ${kl.toFixed(3)} bits (Kullback-Leibler divergence).`));
}

// A request for the experiments, again after each change; its result is drawn in the box.
const experiment = (box, route, fields) => runLatestAndReport(PAUSE, async (signal) => {
  const extra = fields(), about = extra && (await subject(signal));
  if (!about) return box.replaceChildren();
  box.setAttribute("aria-busy", "true");
  const body = { model: about.info.name, tokens: about.ids, asked: about.token.id, ...extra };
  const result = await requestJson(`inspect/${route}`, body, signal);
  drawOutcome(box, result, about);
  box.setAttribute("aria-busy", "false");
});

const offFields = () => ({ heads: [...off.heads].map((name) => name.split(".").map(Number)), mlps: [...off.mlps], mode: off.mode });
const steerFields = () => (steering.plus && steering.minus ? { ...steering, layer: steering.layer - 1 } : null);

// The switches: a square for each head, and a round one for each MLP.
function switchSection(info) {
  const box = el("div", { className: "view" }), update = experiment(box, "ablate", offFields);
  const count = el("span", { role: "status" });
  const all = Array.from({ length: info.n_layer }, (_, l) => [...Array.from({ length: info.n_head }, (__, h) => ({ l, h })), { l, h: null }]).flat();
  const set = ({ h }) => (h === null ? off.mlps : off.heads), item = ({ l, h }) => (h === null ? l : `${l}.${h}`);
  const draw = () => {
    switches.forEach((one, i) => one.setAttribute("aria-pressed", String(set(all[i]).has(item(all[i])))));
    count.textContent = `${off.heads.size} heads and ${off.mlps.size} MLPs are off.`;
  };
  const switches = all.map((part, i) => button("", () => {
    const own = set(part), name = item(part);
    own.has(name) ? own.delete(name) : own.add(name);
    draw();
    update();
  }, { tabIndex: i ? -1 : 0, className: part.h === null ? "mlp" : "", "aria-label": `Switch off ${part.h === null ? `the MLP of layer ${part.l + 1}` : headName(part.l, part.h).toLowerCase()}` }));
  switches.forEach((one, i) => (one.title = all[i].h === null ? `MLP of layer ${all[i].l + 1}` : headName(all[i].l, all[i].h)));
  const grid = el("div", { className: "heads switches", role: "group", "aria-label": "Heads by layer, then the MLP" }, ...switches);
  grid.style.setProperty("--heads", info.n_head + 1);
  addArrowKeys(grid, "button", info.n_head + 1);
  const mode = el("select", { id: "off-mode" }, el("option", { value: "zero" }, "zero"), el("option", { value: "mean" }, "its mean over the text"));
  mode.value = off.mode;
  mode.addEventListener("change", () => {
    off.mode = mode.value;
    update();
  });
  const none = button("Switch all on", () => {
    off.heads.clear();
    off.mlps.clear();
    draw();
    update();
  }, { className: "plain" });
  draw();
  const choice = el("div", { className: "row" }, el("label", { htmlFor: "off-mode" }, "Instead of its output:"), mode, none);
  return { element: section("Switch off", "Which heads and MLPs does the next token need? Select squares; the last column is the MLPs.", grid, count, choice, box), update };
}

function steerSection(info) {
  const box = el("div", { className: "view" }), update = experiment(box, "steer", steerFields);
  steering.layer = Math.min(steering.layer, info.n_layer);
  const text = (name, label, placeholder) => {
    const input = el("input", { id: `steer-${name}`, value: steering[name], maxLength: 400, placeholder, autocomplete: "off" });
    return field(input, label, () => (steering[name] = input.value));
  };
  const slider = (name, label, min, max, step) => {
    const input = el("input", { id: `steer-${name}`, type: "range", min, max, step, value: steering[name] });
    const shown = el("output", { htmlFor: input.id }, input.value);
    const fill = () => input.style.setProperty("--fill", `${(100 * (input.value - min)) / Math.max(1e-9, max - min)}%`);
    fill();
    return field(input, label, () => {
      steering[name] = Number(input.value);
      shown.textContent = input.value;
      fill();
    }, shown);
  };
  const field = (input, label, take, ...more) => {
    input.addEventListener("input", () => {
      take();
      update();
    });
    return el("div", { className: "field" }, el("label", { htmlFor: input.id }, label), input, ...more);
  };
  const fields = [text("plus", "Towards", "Love"), text("minus", "Away from", "Hate"), slider("layer", "Before layer", 1, info.n_layer, 1), slider("strength", "Strength", -20, 20, 0.5)];
  return { element: section("Steer", "The difference of the activations of two prompts is added at every position.", ...fields, box), update };
}

// Draws the sections once for each model, and updates what they show.
export function fillWhatIf(panel) {
  const side = state.sides[state.shown], info = state.models.find(({ name }) => name === side.model);
  if (panel.key !== info.name) {
    panel.key = info.name;
    off.heads.clear();
    off.mlps.clear();
    panel.sections = [switchSection(info), patchSection(info), steerSection(info)];
    panel.replaceChildren(...panel.sections.map(({ element }) => element));
    panel.sections[0].element.open = true;
    for (const { element, update } of panel.sections) element.addEventListener("toggle", () => element.open && update());
  }
  for (const { element, update } of panel.sections) if (element.open) update();
}
