// The panels of the inspector: next tokens, attention, layers, tokens and the tree.

import { requestJson } from "./api.js";
import { openCard } from "./card.js";
import { $ } from "./dom.js";
import { drawAttention, drawBars, drawLayers, drawTokens, drawTree, showMessage } from "./draw.js";
import { runLatestAndReport } from "./notice.js";
import { requestNextTokens } from "./request.js";
import { render, textReplaced, onRender, path, infoOf, state } from "./state.js";
import { idsOf, hasVocabulary } from "./tokens.js";
import { add, startsGenerated, endOf, goTo, spansOf, textOf } from "./tree.js";

const NO_TOKEN = "Select a generated token: click it, or press Alt ↵ at the cursor.";

async function fillSettings(panel, signal) {
  const side = state.sides[state.shown];
  const ids = await idsOf(path(), infoOf(side.model), signal);
  const { tokens, kept, entropy } = await requestNextTokens(side, ids, { top: 12 }, signal);
  drawBars($("next"), tokens);
  const many = kept === 1 ? "1 token has" : `${kept.toLocaleString("en")} tokens have`;
  $("next-note").textContent = `${many} a probability above 0; the entropy is ${entropy.toFixed(1)} bits. The tick is the probability before the sampling settings.`;
}

// The token to inspect: the selected one, or the last generated one.
async function selectedToken(info, signal) {
  if (state.selected) return state.selected;
  const nodes = path();
  const i = nodes.findLastIndex((node) => hasVocabulary(node, info));
  if (i < 0) return null;
  return { ids: await idsOf(nodes.slice(0, i), info, signal), token: { id: nodes[i].generated.id, text: nodes[i].text } };
}

async function fillAttention(panel, signal) {
  const { model } = state.sides.A;
  const selected = await selectedToken(infoOf(model), signal);
  if (!selected) return showMessage(panel, NO_TOKEN);
  drawAttention(panel, await requestJson("inspect/attention", { model, tokens: selected.ids }, signal), selected.token.text);
}

async function fillLayers(panel, signal) {
  const { model } = state.sides.A;
  const selected = await selectedToken(infoOf(model), signal);
  if (!selected) return showMessage(panel, NO_TOKEN);
  const { ids, token } = selected;
  drawLayers(panel, await requestJson("inspect/lens", { model, tokens: ids, asked: token.id }, signal), token.text);
}

async function fillTokens(panel, signal) {
  const nodes = path(), text = textOf(nodes);
  const info = infoOf(state.sides.A.model);
  const ids = await idsOf(nodes, info, signal);
  const key = `${info.name} ${text && ids}`;
  if (panel.key === key) return; // the focus may be on one of its buttons
  const result = text && (await requestJson("inspect/score", { model: info.name, tokens: ids }, signal));
  panel.key = key;
  if (!text) return showMessage(panel, "Write something first.");
  const first = startsGenerated(nodes) ? 1 : 0; // the end-of-text token is not part of the text
  const origin = result.tokens[first].start;
  drawTokens(panel, result.tokens.slice(first), result.perplexity, (i, button) => {
    const { id, text: word, start } = result.tokens[i + first];
    const before = i + first ? ids.slice(0, i + first) : [info.end_of_text];
    openCard({ ids: before, token: { id, text: word }, nodes: () => nodesBefore(start - origin), opener: button });
  });
}

// The nodes of the first characters of the text; typed text may be cut within a node.
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
    textReplaced();
  });
}

const PANELS = { settings: fillSettings, attention: fillAttention, layers: fillLayers, tokens: fillTokens, tree: fillTree };

const fill = runLatestAndReport(80, async (signal) => {
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
  onRender(drawTabs);
  const names = Object.keys(PANELS);
  const choose = (name) => {
    state.tab = name;
    render();
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
