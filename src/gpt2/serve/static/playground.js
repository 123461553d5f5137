// The page: a text, who goes on with it, and what is asked about it.

import { ApiError, ask, events, latest, useKey } from "./api.js";
import { $, el, shadeOf } from "./dom.js";
import { drawAttention, drawBars, drawLayers, drawTokens, drawTree, fillCard, place, say, showTab } from "./look.js";
import { checked, defaults, drawSettings, samplingOf } from "./settings.js";
import { wireShare } from "./dialogs.js";
import { draft, fromFragment, keepDraft, remember } from "./share.js";
import { add, begunByModel, edit, endOf, goTo, idsOf, makeTree, packed, pathTo, spansOf, textOf, unpacked } from "./tree.js";

const state = {
  models: [],
  tree: makeTree(),
  begin: null, // the node where the last continuation began
  other: [], // the path of B, when two are compared
  sides: { A: { model: "", settings: defaults() }, B: { model: "", settings: { ...defaults(), temperature: 0.5 } } },
  shown: "A",
  comparing: false,
  running: null,
  chosen: null, // {ids, token: {id, text}}: a token that is looked at, and what stood before it
};

const shapeOf = (name) => state.models.find((model) => model.name === name);
const path = () => pathTo(state.tree.leaf);
const text = $("text");

// --- the editor

function paint() {
  const nodes = path();
  const whole = textOf(nodes);
  if (text.value !== whole) text.value = whole;
  $("backdrop").replaceChildren(...nodes.map(inked), "\u200b");
}

// The space before a word stays blank.
function inked({ text: words, said }) {
  if (said?.logprob == null) return el("span", {}, words);
  const [, space, word] = words.match(/^(\s*)([^]*)$/);
  return el("span", {}, space, el("span", { className: shadeOf(said.logprob) }, word));
}

function paintNew(node) {
  text.value += node.text;
  $("backdrop").lastChild.before(inked(node));
}

function paintOther() {
  const shared = state.begin ? pathTo(state.begin) : path();
  const own = state.other.map((node) => inked(node));
  $("other").replaceChildren(el("span", { className: "shared" }, textOf(shared)), ...own);
}

function changed() {
  paint();
  keepDraft({ path: packed(path()), ...state.sides.A });
  showNext();
  refreshPanel();
}

// --- continuing

const ENOUGH = 0.75; // of the context, once a text has outgrown it

async function* continued(side, nodes, signal) {
  const shape = shapeOf(side.model);
  let prompt = await idsOf(nodes, shape, signal);
  if (prompt.length >= shape.block_size) prompt = prompt.slice(-Math.floor(shape.block_size * ENOUGH));
  const body = { ...requestOf(side), prompt, stream: true, logprobs: 1 };
  for await (const event of events("v1/completions", body, signal)) {
    const choice = event.choices[0];
    if (choice) yield* tokensOf(choice, shape);
  }
}

function requestOf({ model, settings }) {
  const { stop, ...numbers } = settings;
  return { model, prompt: textOf(path()), ...numbers, ...(stop.length && { stop }) };
}

function* tokensOf({ text: words, logprobs }, shape) {
  const ids = (logprobs?.token_ids ?? []).filter((id) => id !== shape.end_of_text);
  if (!ids.length) {
    if (words) yield { text: words, said: { id: null, logprob: null, vocabulary: null } };
    return;
  }
  const pieces = logprobs.tokens.join("") === words ? logprobs.tokens : ids.map((_, i) => (i === ids.length - 1 ? words : ""));
  for (const [i, id] of ids.entries()) {
    yield { text: pieces[i], said: { id, logprob: logprobs.token_logprobs[i], vocabulary: shape.fingerprint } };
  }
}

async function write(side, from, onToken, signal) {
  for await (const token of continued(side, from, signal)) onToken(token);
}

async function run(begin) {
  if (state.running || !state.models.length) return;
  const controller = (state.running = new AbortController());
  const started = performance.now();
  let count = 0;
  hideCard();
  clearNotice();
  state.begin = state.tree.leaf = begin;
  state.other = [];
  paint();
  setRunning(true);
  const onA = ({ text: words, said }) => {
    state.tree.leaf = add(state.tree.leaf, words, said);
    paintNew(state.tree.leaf);
    $("status").textContent = `${++count} tokens`;
  };
  const onB = (token) => {
    state.other.push(token);
    paintOther();
  };
  const from = pathTo(begin);
  const works = [write(state.sides.A, from, onA, controller.signal)];
  if (state.comparing) works.push(write({ ...state.sides.B, settings: { ...state.sides.B.settings, seed: state.sides.A.settings.seed } }, from, onB, controller.signal));
  try {
    await Promise.all(works);
  } catch (error) {
    tell(error);
    controller.abort();
  } finally {
    await Promise.allSettled(works);
    state.running = null;
    setRunning(false);
  }
  const seconds = (performance.now() - started) / 1000;
  const end = controller.signal.aborted ? "Stopped after" : "";
  $("status").textContent = `${end} ${count} tokens, ${(count / seconds).toFixed(0)} a second`.trim();
  if (count) remember(path(), state.sides.A);
  changed();
}

function setRunning(on) {
  $("go").hidden = on;
  $("stop").hidden = !on;
  text.readOnly = on;
  document.body.classList.toggle("running", on);
  if (on) $("status").textContent = "Reading…";
}

const goOn = () => run(state.tree.leaf);

function again() {
  const { settings } = state.sides.A;
  settings.seed = (settings.seed + 1) % 1000;
  showSettings();
  run(state.begin ?? state.tree.leaf);
}

// --- errors

let retry = () => {};

function tell(error, again = goOn) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  $("notice").querySelector("p").textContent = error.message;
  $("notice").hidden = false;
  $("key-form").hidden = error.status !== 401;
  retry = again;
}

function clearNotice() {
  $("notice").hidden = $("key-form").hidden = true;
}

// Work that ends in the panel, or in a notice.
const quietly = (pause, work, again) => latest(pause, async (signal, ...args) => {
  try {
    await work(signal, ...args);
  } catch (error) {
    if (!signal.aborted) tell(error, again);
  }
});

// --- what comes next

async function askNext(side, ids, more, signal) {
  const shape = shapeOf(side.model);
  const prompt = state.begin ? (await idsOf(pathTo(state.begin), shape, signal)).length : ids.length;
  const prompt_length = Math.min(prompt, ids.length);
  return ask("inspect/next", { model: side.model, tokens: ids, prompt_length, ...samplingOf(side.settings), ...more }, signal);
}

const showNext = quietly(80, async (signal) => {
  const side = state.sides[state.shown];
  if (state.running || !side.model) return;
  const ids = await idsOf(path(), shapeOf(side.model), signal);
  const told = await askNext(side, ids, { top: 12 }, signal);
  drawBars($("next"), told.tokens);
  const kept = told.kept.toLocaleString("en");
  $("next-note").textContent = `${kept} ${told.kept === 1 ? "token has" : "tokens have"} a chance, ${told.entropy.toFixed(1)} bits. The tick is the chance before the settings.`;
}, () => showNext());

// --- a chosen token: its alternatives, attention and layers

const openCard = quietly(0, async (signal, { ids, token, nodes, rect, focus }) => {
  const side = state.sides.A;
  state.chosen = { ids, token };
  const told = await askNext(side, ids, { top: 10, asked: token.id }, signal);
  const pick = (other) => branchTo(nodes, other);
  const more = { Attention: () => lookAt("attention"), Layers: () => lookAt("layers") };
  fillCard($("alternatives"), told, token.text, { pick, more, close: hideCard });
  place($("alternatives"), rect);
  if (focus) $("alternatives").querySelector("button").focus();
  refreshPanel();
}, clearNotice);

function hideCard() {
  if ($("alternatives").hidden) return;
  if ($("alternatives").contains(document.activeElement)) text.focus();
  $("alternatives").hidden = true;
}

function lookAt(tab) {
  hideCard();
  choose(tab);
  $(`tab-${tab}`).focus();
}

// Takes another token after some nodes, and goes on from there.
function branchTo(nodes, token) {
  goTo(state.tree, nodes.at(-1) ?? state.tree.root);
  const logprob = Math.log(Math.max(token.raw, 1e-30));
  const said = { id: token.id, logprob, vocabulary: shapeOf(state.sides.A.model).fingerprint };
  const leaf = add(state.tree.leaf, token.text, said);
  text.focus();
  run(leaf);
}

async function chooseAt(offset, focus) {
  const nodes = path();
  const spans = spansOf(nodes);
  const at = spans.findIndex(({ node, start, end }) => node.said && node.said.id !== null && start <= offset && offset < end);
  const i = at < 0 && focus ? spans.findLastIndex(({ node, end }) => node.said && end === offset) : at;
  if (i < 0) return hideCard();
  const shape = shapeOf(state.sides.A.model), { said, text: words } = nodes[i];
  if (said.vocabulary !== shape.fingerprint) return tell(new ApiError("This word is of a model with another vocabulary."), clearNotice);
  try {
    const ids = await idsOf(nodes.slice(0, i), shape);
    const rect = lastRect($("backdrop").children[i]);
    openCard({ ids, token: { id: said.id, text: words }, nodes: nodes.slice(0, i), rect, focus });
  } catch (error) {
    tell(error, clearNotice);
  }
}

const lastRect = (element) => [...element.getClientRects()].at(-1) ?? text.getBoundingClientRect();

async function lookedAt(signal) {
  if (state.chosen) return state.chosen;
  const shape = shapeOf(state.sides.A.model), nodes = path();
  const i = nodes.findLastIndex(({ said }) => said && said.vocabulary === shape.fingerprint);
  if (i < 0) return null;
  return { ids: await idsOf(nodes.slice(0, i), shape, signal), token: { id: nodes[i].said.id, text: nodes[i].text } };
}

const NOTHING = "Choose a word that the model has said: click it, or press Alt ↵ where the cursor is.";

async function fillAttention(panel, signal) {
  const chosen = await lookedAt(signal);
  if (!chosen) return say(panel, NOTHING);
  drawAttention(panel, await ask("inspect/attention", { model: state.sides.A.model, tokens: chosen.ids }, signal), chosen.token.text);
}

async function fillLayers(panel, signal) {
  const chosen = await lookedAt(signal);
  if (!chosen) return say(panel, NOTHING);
  const question = { model: state.sides.A.model, tokens: chosen.ids, asked: chosen.token.id };
  drawLayers(panel, await ask("inspect/lens", question, signal), chosen.token.text);
}

async function fillTokens(panel, signal) {
  if (!text.value) return say(panel, "Write something first.");
  const shape = shapeOf(state.sides.A.model);
  const ids = await idsOf(path(), shape, signal);
  const told = await ask("inspect/score", { model: shape.name, tokens: ids }, signal);
  const first = begunByModel(path()) ? 1 : 0; // the end of another text is none of this one
  const tokens = told.tokens.slice(first);
  drawTokens(panel, tokens, told.perplexity, (i, button) => {
    const context = i + first ? ids.slice(0, i + first) : [shape.end_of_text];
    const rect = button.getBoundingClientRect();
    openCard({ ids: context, token: tokens[i], nodes: nodesOf(tokens.slice(0, i)), rect, focus: true });
  });
}

// The nodes that stand for the first tokens of the text; where they cut what was typed, a typed beginning of it.
function nodesOf(tokens) {
  const length = tokens.reduce((sum, token) => sum + token.text.length, 0);
  const nodes = [];
  for (const { node, start, end } of spansOf(path())) {
    if (end <= length) nodes.push(node);
    else if (start < length) nodes.push(add(nodes.at(-1) ?? state.tree.root, node.text.slice(0, length - start)));
    if (end >= length) break;
  }
  return nodes;
}

function fillTree(panel) {
  drawTree(panel, state.tree, (node) => {
    goTo(state.tree, endOf(node));
    state.begin = state.chosen = null;
    changed();
  });
}

const PANELS = { attention: fillAttention, layers: fillLayers, tokens: fillTokens, tree: fillTree };
let tab = "settings";

const refreshPanel = quietly(120, async (signal) => {
  if (tab in PANELS && !state.running && state.models.length) await PANELS[tab]($(`panel-${tab}`), signal);
}, () => refreshPanel());

function choose(name) {
  tab = name;
  showTab(name);
  refreshPanel();
}

// --- settings, models and sides

const fillSettings = drawSettings((name, value) => {
  state.sides[state.shown].settings[name] = value;
  showNext();
});
const showSettings = () => fillSettings(state.sides[state.shown].settings);

function show(name) {
  state.shown = name;
  $("show-a").setAttribute("aria-pressed", String(name === "A"));
  $("show-b").setAttribute("aria-pressed", String(name === "B"));
  $("model-b").hidden = name !== "B";
  showSettings();
  showNext();
}

function compare(on) {
  state.comparing = on;
  $("compare").setAttribute("aria-pressed", String(on));
  $("sides").hidden = $("side-a").hidden = $("sheet-b").hidden = !on;
  document.body.classList.toggle("comparing", on);
  state.other = [];
  paintOther();
  nameSides();
  show(on ? "B" : "A");
  choose("settings");
}

function nameSides() {
  $("side-a").querySelector("span").textContent = state.sides.A.model;
  $("side-b").textContent = state.sides.B.model;
}

function pickModel(name, model) {
  state.sides[name].model = model;
  state.chosen = null;
  if (name === "A") showShape();
  nameSides();
  showNext();
  refreshPanel();
}

function showShape() {
  const shape = shapeOf(state.sides.A.model);
  const millions = (shape.parameters / 1e6).toFixed(shape.parameters < 1e7 ? 1 : 0);
  $("shape").textContent = `${millions} M parameters, ${shape.n_layer} layers of ${shape.n_head} heads, context ${shape.block_size}`;
}

function fillModels() {
  for (const [id, name] of [["model", "A"], ["model-b", "B"]]) {
    $(id).replaceChildren(...state.models.map((model) => el("option", { value: model.name }, model.name)));
    if (!shapeOf(state.sides[name].model)) state.sides[name].model = state.models[name === "B" && state.models.length > 1 ? 1 : 0].name;
    $(id).value = state.sides[name].model;
  }
}

// --- taking up what was kept or shared

function take({ path: items, model, settings, b }) {
  state.tree = state.tree.root.children.length ? state.tree : makeTree();
  unpacked(state.tree, items.slice(0, 20000));
  if (shapeOf(model)) state.sides.A.model = model;
  state.sides.A.settings = checked(settings);
  if (b) state.sides.B = { model: shapeOf(b.model) ? b.model : state.sides.B.model, settings: checked(b.settings) };
  state.begin = state.chosen = null;
  $("model").value = state.sides.A.model;
  $("model-b").value = state.sides.B.model;
  if (b) compare(true);
  showShape();
  showSettings();
  changed();
}

const shared = () => ({ path: packed(path()), ...state.sides.A, ...(state.comparing && { b: state.sides.B }) });

// --- wiring

function onKey(event) {
  if (event.key === "Escape" && !$("alternatives").hidden) hideCard();
  else if (event.key === "Escape" && state.running) state.running.abort();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) goOn();
  else if (event.key === "Enter" && event.altKey && event.target === text) chooseAt(text.selectionStart, true);
  else return;
  event.preventDefault();
}

function wireEditor() {
  text.addEventListener("input", () => {
    edit(state.tree, text.value);
    state.begin = state.chosen = null;
    hideCard();
    changed();
  });
  text.addEventListener("click", () => {
    if (!state.running && text.selectionStart === text.selectionEnd) chooseAt(text.selectionStart, false);
  });
  $("go").addEventListener("click", goOn);
  $("again").addEventListener("click", again);
  $("stop").addEventListener("click", () => state.running?.abort());
  $("retry").addEventListener("click", () => {
    clearNotice();
    retry();
  });
  $("dismiss").addEventListener("click", clearNotice);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value);
    clearNotice();
    state.models.length ? retry() : start();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", (event) => {
    if (!$("alternatives").contains(event.target)) hideCard();
  });
}

function wirePanel() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((button, i) => {
    button.addEventListener("click", () => choose(button.id.slice(4)));
    button.addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      choose(next.id.slice(4));
      next.focus();
    });
  });
  $("model").addEventListener("change", () => pickModel("A", $("model").value));
  $("model-b").addEventListener("change", () => pickModel("B", $("model-b").value));
  $("compare").addEventListener("click", () => compare(!state.comparing));
  $("show-a").addEventListener("click", () => show("A"));
  $("show-b").addEventListener("click", () => show("B"));
  $("reset").addEventListener("click", () => {
    state.sides[state.shown].settings = defaults();
    showSettings();
    showNext();
  });
  $("adopt").addEventListener("click", () => {
    if (state.running || !state.other.length) return;
    goTo(state.tree, state.begin);
    for (const token of state.other) state.tree.leaf = add(state.tree.leaf, token.text, token.said);
    state.other = [];
    paintOther();
    changed();
  });
}

async function start() {
  try {
    state.models = (await ask("inspect/models")).models;
  } catch (error) {
    return tell(error, start);
  }
  fillModels();
  showShape();
  showSettings();
  const kept = fromFragment(location.hash) ?? draft();
  if (Array.isArray(kept?.path)) take(kept);
  else changed();
}

wireEditor();
wirePanel();
wireShare({ request: () => requestOf(state.sides.A), path, side: () => state.sides.A, shared, take });
addEventListener("hashchange", () => {
  const given = fromFragment(location.hash);
  if (given) take(given);
});
start();
