// The card under a token: what it might have been, and from there another branch.

import { ApiError } from "./api.js";
import { $ } from "./dom.js";
import { fillCard, place } from "./look.js";
import { quietly, tell } from "./notice.js";
import { askNext } from "./request.js";
import { changed, onChange, path, shapeOf, state } from "./state.js";
import { idsOf, isOf } from "./tokens.js";
import { add, goTo, spansOf } from "./tree.js";
import { run } from "./writing.js";

const text = $("text"), card = $("alternatives");
let back = text; // where the keyboard goes when the card is closed

// token: {id, text}, which stands after `ids`; nodes: gives the path that stands for them; opener: what it is about.
export const openCard = quietly(0, async (signal, { ids, token, nodes, opener, keyboard = true }) => {
  const rect = [...opener.getClientRects()].at(-1) ?? text.getBoundingClientRect();
  const told = await askNext(state.sides.A, ids, { top: 10, asked: token.id }, signal);
  state.chosen = { ids, token };
  changed();
  const more = { Attention: () => lookAt("attention"), Layers: () => lookAt("layers") };
  fillCard(card, told, token.text, { pick: (other) => branchTo(nodes(), other), more, close: hideCard });
  place(card, rect);
  back = opener.matches("button") ? opener : text;
  if (keyboard) card.querySelector("button").focus();
});

export function hideCard() {
  if (card.hidden) return;
  if (card.contains(document.activeElement)) (back.isConnected ? back : text).focus();
  card.hidden = true;
}

function lookAt(tab) {
  state.tab = tab;
  changed();
  $(`tab-${tab}`).focus();
}

// Takes another token after some nodes, and goes on from there.
function branchTo(nodes, { id, text: word, raw }) {
  goTo(state.tree, nodes.at(-1) ?? state.tree.root);
  const vocabulary = shapeOf(state.sides.A.model).fingerprint;
  const leaf = add(state.tree.leaf, word, { id, logprob: Math.log(Math.max(raw, 1e-30)), vocabulary });
  text.focus();
  run(leaf);
}

// Opens the card of the token at a place in the text; for the keyboard, also of the one that ends there.
async function chooseAt(offset, keyboard) {
  const nodes = path(), shape = shapeOf(state.sides.A.model), spans = spansOf(nodes);
  const at = spans.findIndex(({ node, start, end }) => node.said && start <= offset && offset < end);
  const i = at < 0 && keyboard ? spans.findLastIndex(({ node, end }) => node.said && end === offset) : at;
  if (i < 0) return hideCard();
  if (!isOf(nodes[i], shape)) return tell(new ApiError("This word is of a model with another vocabulary."), hideCard);
  const before = nodes.slice(0, i), { said, text: word } = nodes[i];
  try {
    const ids = await idsOf(before, shape);
    openCard({ ids, token: { id: said.id, text: word }, nodes: () => before, opener: $("backdrop").children[i], keyboard });
  } catch (error) {
    tell(error, () => chooseAt(offset, keyboard));
  }
}

export function wireCard() {
  onChange(hideCard);
  text.addEventListener("click", () => {
    if (!state.running && state.models.length && text.selectionStart === text.selectionEnd) chooseAt(text.selectionStart, false);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.altKey || state.running || !state.models.length) return;
    event.preventDefault();
    chooseAt(text.selectionStart, true);
  });
  document.addEventListener("pointerdown", (event) => {
    if (!card.contains(event.target)) hideCard();
  });
}
