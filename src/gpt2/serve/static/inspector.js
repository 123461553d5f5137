// The panels of the inspector: next tokens, attention, layers, tokens and the tree.

import { requestJson } from "./api.js";
import { fillAttention } from "./attention.js";
import { drawBars } from "./bars.js";
import { nodeOf, openCard } from "./card.js";
import { $, showMessage } from "./dom.js";
import { fillChat, hasChat } from "./chat.js";
import { fillContributions } from "./contributions.js";
import { fillHeads } from "./heads.js";
import { clearHeat } from "./heat.js";
import { fillLensMap } from "./lens.js";
import { drawLayers, drawTokens, drawTree } from "./panels.js";
import { runLatestAndReport } from "./notice.js";
import { requestNextTokens } from "./request.js";
import { render, textReplaced, onRender, path, infoOf, leafOf, setLeaf, state } from "./state.js";
import { selectedToken, subject } from "./subject.js";
import { idsOf, inWindow, tokensOf } from "./tokens.js";
import { fillWhatIf } from "./whatif.js";
import { add, endOf, goTo, nodesBefore, startsOf, textOf } from "./tree.js";
import { remember } from "./undo.js";

const NO_TOKEN = "Select a generated token: click it, or press Alt ↵ at the cursor.";

async function fillSettings(panel, signal) {
  const name = state.shown, leaf = leafOf(name);
  const tokens = await tokensOf(path(name), infoOf(state.sides[name].model), signal);
  const { tokens: likely, kept, entropy } = await requestNextTokens(name, tokens, { top: 10 }, signal);
  drawBars($("next"), likely, (token) => insert(name, leaf, token));
  const many = kept === 1 ? "1 token has" : `${kept.toLocaleString("en")} tokens have`;
  $("next-note").textContent = `${many} a probability above 0; the entropy is ${entropy.toFixed(1)} bits. The tick is the probability before the sampling settings. Click a token to insert it.`;
}

// Adds a likely token at the end of a text.
function insert(name, leaf, token) {
  if (state.running) return;
  state.selected = null;
  setLeaf(name, add(leaf, ...nodeOf(name, token)));
  if (name === "A") remember("insert");
  render();
}

// A panel about one token.
const aboutToken = (draw) => async (panel, signal) => {
  const selected = await selectedToken(signal);
  const { model } = state.sides[state.shown];
  if (!selected) return showMessage(panel, NO_TOKEN);
  await draw(panel, selected, model, infoOf(model), signal);
};

const fillToken = aboutToken(fillAttention);

async function fillAttentionPanel(panel, signal) {
  if (state.view === "token") return fillToken($("one-token"), signal);
  const side = state.shown, info = infoOf(state.sides[side].model), nodes = path(side);
  if (!textOf(nodes)) return showMessage($("all-heads"), "Write something first.");
  await fillHeads($("all-heads"), side, info, inWindow(await tokensOf(nodes, info, signal), info), signal);
}

const fillLens = aboutToken(async (panel, { before, token }, model, info, signal) => {
  drawLayers(panel, await requestJson("inspect/lens", { model, tokens: idsOf(inWindow(before, info)), asked: token.id }, signal), token.text);
});

async function fillLayers(_, signal) {
  await fillLens($("one-lens"), signal);
  const about = await subject(signal);
  $("lens-map").hidden = about === null;
  if (about) await fillLensMap($("lens-map"), about, signal);
}

async function fillTokens(panel, signal) {
  const side = state.shown, nodes = path(side), text = textOf(nodes);
  const info = infoOf(state.sides[side].model);
  const tokens = await tokensOf(nodes, info, signal);
  const key = `${info.name} ${text && idsOf(tokens)}`;
  if (panel.key === key) return; // the focus may be on one of its buttons
  const result = text && (await requestJson("inspect/score", { model: info.name, tokens: idsOf(tokens) }, signal));
  panel.key = key;
  if (!text) return showMessage(panel, "Write something first.");
  const first = tokens[0].lead ? 1 : 0; // the end-of-text token is not part of the text
  const starts = startsOf(result.tokens, first, text);
  const shown = result.tokens.slice(first).map((token, i) => ({ ...token, node: tokens[i + first].node, start: starts[i] }));
  drawTokens(panel, shown, result.perplexity, text, (i, opener) => {
    const { id, text: word, start, node } = shown[i];
    const before = i + first ? tokens.slice(0, i + first) : [{ id: info.end_of_text, start: 0, node: null, lead: true }];
    const selected = { side, node, before, token: { id, text: word }, start };
    openCard({ selected, nodes: () => nodesBefore(state.tree, nodes, start), opener });
  });
}

function fillTree(panel) {
  drawTree(panel, state.tree, (node) => {
    goTo(state.tree, endOf(node));
    textReplaced();
    remember("branch");
  });
}

const PANELS = { settings: fillSettings, attention: fillAttentionPanel, layers: fillLayers, contributions: fillContributions, whatif: fillWhatIf, tokens: fillTokens, tree: fillTree, chat: fillChat };

const fill = runLatestAndReport(80, async (signal) => {
  const panel = $(`panel-${state.tab}`);
  if (!state.running && state.models.length) await PANELS[state.tab](panel, signal);
  if (!signal.aborted) panel.setAttribute("aria-busy", "false");
});

function drawTabs() {
  $("tab-chat").hidden = !hasChat(state.sides[state.shown].model);
  if (state.tab === "chat" && $("tab-chat").hidden) state.tab = "settings";
  for (const name of Object.keys(PANELS)) {
    const on = name === state.tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(on));
    $(`tab-${name}`).tabIndex = on ? 0 : -1;
    $(`panel-${name}`).hidden = !on;
  }
  for (const view of ["token", "heads"]) $(`view-${view}`).setAttribute("aria-pressed", String(view === state.view));
  $("one-token").hidden = state.view !== "token";
  $("all-heads").hidden = state.view !== "heads";
  clearHeat();
  if (state.models.length) $(`panel-${state.tab}`).setAttribute("aria-busy", "true"); // what it shows is of the text before
  fill();
}

export function wireInspector() {
  onRender(drawTabs);
  for (const view of ["token", "heads"]) {
    $(`view-${view}`).addEventListener("click", () => {
      state.view = view;
      render();
    });
  }
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
      const there = names.filter((each) => !$(`tab-${each}`).hidden);
      const next = there[(i + step + there.length) % there.length]; // the hidden one is the last
      choose(next);
      $(`tab-${next}`).focus();
    });
  });
}
