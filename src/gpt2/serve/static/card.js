// The card of a token: its alternatives, each of which starts another branch.

import { ApiError } from "./api.js";
import { $ } from "./dom.js";
import { fillCard, placeCard } from "./draw.js";
import { runLatestAndReport, showError } from "./notice.js";
import { requestNextTokens } from "./request.js";
import { render, onRender, path, infoOf, state } from "./state.js";
import { idsOf, hasVocabulary } from "./tokens.js";
import { add, goTo, spansOf } from "./tree.js";
import { run } from "./generation.js";

const text = $("text"), card = $("alternatives");
let back = text; // what gets the focus when the card is closed

// token: {id, text} after the tokens `ids`; nodes: returns the path of `ids`; opener: the element the card belongs to.
export const openCard = runLatestAndReport(0, async (signal, { ids, token, nodes, opener, keyboard = true }) => {
  const rect = [...opener.getClientRects()].at(-1) ?? text.getBoundingClientRect();
  const result = await requestNextTokens(state.sides.A, ids, { top: 10, asked: token.id }, signal);
  state.selected = { ids, token };
  render();
  const more = { Attention: () => openTab("attention"), Layers: () => openTab("layers") };
  fillCard(card, result, token.text, { pick: (other) => startBranch(nodes(), other), more, close: hideCard });
  placeCard(card, rect);
  back = opener.matches("button") ? opener : text;
  if (keyboard) card.querySelector("button").focus();
});

export function hideCard() {
  if (card.hidden) return;
  if (card.contains(document.activeElement)) (back.isConnected ? back : text).focus();
  card.hidden = true;
}

function openTab(tab) {
  state.tab = tab;
  render();
  $(`tab-${tab}`).focus();
}

// Adds another token after some nodes, and generates from there.
function startBranch(nodes, { id, text: word, raw }) {
  goTo(state.tree, nodes.at(-1) ?? state.tree.root);
  const vocabulary = infoOf(state.sides.A.model).fingerprint;
  const leaf = add(state.tree.leaf, word, { id, logprob: Math.log(Math.max(raw, 1e-30)), vocabulary });
  text.focus();
  run(leaf);
}

// Opens the card of the token at an offset of the text; with the keyboard also of the token that ends there.
async function openCardAt(offset, keyboard) {
  const nodes = path(), info = infoOf(state.sides.A.model), spans = spansOf(nodes);
  const at = spans.findIndex(({ node, start, end }) => node.generated && start <= offset && offset < end);
  const i = at < 0 && keyboard ? spans.findLastIndex(({ node, end }) => node.generated && end === offset) : at;
  if (i < 0) return hideCard();
  if (!hasVocabulary(nodes[i], info)) return showError(new ApiError("This token is from a model with another vocabulary."), hideCard);
  const before = nodes.slice(0, i), { generated, text: word } = nodes[i];
  try {
    const ids = await idsOf(before, info);
    openCard({ ids, token: { id: generated.id, text: word }, nodes: () => before, opener: $("backdrop").children[i], keyboard });
  } catch (error) {
    showError(error, () => openCardAt(offset, keyboard));
  }
}

export function wireCard() {
  onRender(hideCard);
  text.addEventListener("click", () => {
    if (!state.running && state.models.length && text.selectionStart === text.selectionEnd) openCardAt(text.selectionStart, false);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.altKey || state.running || !state.models.length) return;
    event.preventDefault();
    openCardAt(text.selectionStart, true);
  });
  document.addEventListener("pointerdown", (event) => {
    if (!card.contains(event.target)) hideCard();
  });
}
