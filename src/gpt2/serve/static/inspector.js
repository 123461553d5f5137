// The panels beside the text: what comes next, attention, layers, tokens, and the tree.

import { ask } from "./api.js";
import { openCard } from "./card.js";
import { $ } from "./dom.js";
import { drawAttention, drawBars, drawLayers, drawTokens, drawTree, say } from "./look.js";
import { quietly } from "./notice.js";
import { askNext } from "./request.js";
import { changed, moved, onChange, path, shapeOf, state } from "./state.js";
import { idsOf, isOf } from "./tokens.js";
import { add, begunByModel, endOf, goTo, spansOf, textOf } from "./tree.js";

const NOTHING = "Choose a word that the model has said: click it, or press Alt ↵ where the cursor is.";

async function fillSettings(panel, signal) {
  const side = state.sides[state.shown];
  const ids = await idsOf(path(), shapeOf(side.model), signal);
  const { tokens, kept, entropy } = await askNext(side, ids, { top: 12 }, signal);
  drawBars($("next"), tokens);
  const many = kept === 1 ? "1 token has" : `${kept.toLocaleString("en")} tokens have`;
  $("next-note").textContent = `${many} a chance, ${entropy.toFixed(1)} bits. The tick is the chance before the settings.`;
}

// The token that is looked at: the chosen one, or the last that was said.
async function lookedAt(shape, signal) {
  if (state.chosen) return state.chosen;
  const nodes = path();
  const i = nodes.findLastIndex((node) => isOf(node, shape));
  if (i < 0) return null;
  return { ids: await idsOf(nodes.slice(0, i), shape, signal), token: { id: nodes[i].said.id, text: nodes[i].text } };
}

async function fillAttention(panel, signal) {
  const { model } = state.sides.A;
  const chosen = await lookedAt(shapeOf(model), signal);
  if (!chosen) return say(panel, NOTHING);
  drawAttention(panel, await ask("inspect/attention", { model, tokens: chosen.ids }, signal), chosen.token.text);
}

async function fillLayers(panel, signal) {
  const { model } = state.sides.A;
  const chosen = await lookedAt(shapeOf(model), signal);
  if (!chosen) return say(panel, NOTHING);
  const { ids, token } = chosen;
  drawLayers(panel, await ask("inspect/lens", { model, tokens: ids, asked: token.id }, signal), token.text);
}

async function fillTokens(panel, signal) {
  const nodes = path(), text = textOf(nodes);
  const shape = shapeOf(state.sides.A.model);
  const ids = await idsOf(nodes, shape, signal);
  const key = `${shape.name} ${text && ids}`;
  if (panel.key === key) return; // somebody may be among its buttons
  const told = text && (await ask("inspect/score", { model: shape.name, tokens: ids }, signal));
  panel.key = key;
  if (!text) return say(panel, "Write something first.");
  const first = begunByModel(nodes) ? 1 : 0; // the end of another text is none of this one
  const origin = told.tokens[first].start;
  drawTokens(panel, told.tokens.slice(first), told.perplexity, (i, button) => {
    const { id, text: word, start } = told.tokens[i + first];
    const before = i + first ? ids.slice(0, i + first) : [shape.end_of_text];
    openCard({ ids: before, token: { id, text: word }, nodes: () => nodesBefore(start - origin), opener: button });
  });
}

// The nodes of the text's first characters; where they cut what was typed, a typed beginning of it.
function nodesBefore(characters) {
  const length = [...textOf(path())].slice(0, characters).join("").length;
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
    moved();
  });
}

const PANELS = { settings: fillSettings, attention: fillAttention, layers: fillLayers, tokens: fillTokens, tree: fillTree };

const fill = quietly(80, async (signal) => {
  if (!state.running && state.models.length) await PANELS[state.tab]($(`panel-${state.tab}`), signal);
});

function drawTabs() {
  for (const name of Object.keys(PANELS)) {
    const on = name === state.tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(on));
    $(`tab-${name}`).tabIndex = on ? 0 : -1;
    $(`panel-${name}`).hidden = !on;
  }
  fill();
}

export function wireInspector() {
  onChange(drawTabs);
  const names = Object.keys(PANELS);
  const choose = (name) => {
    state.tab = name;
    changed();
  };
  names.forEach((name, i) => {
    $(`tab-${name}`).addEventListener("click", () => choose(name));
    $(`tab-${name}`).addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (!step) return;
      const next = names[(i + step + names.length) % names.length];
      choose(next);
      $(`tab-${next}`).focus();
    });
  });
}
