// The dialogs for saved texts and sharing.

import { $, button, el } from "./dom.js";
import { readableRequest } from "./request.js";
import { asCommand, asCurl, asPython } from "./snippets.js";
import { collect, keptHeads } from "./exporting.js";
import { asPage } from "./page_file.js";
import { asPicture } from "./picture.js";
import { addToHistory, copy, download, removeText, removeUnnamed, savedTexts, toFragment } from "./share.js";
import { infoOf, path, state } from "./state.js";
import { serialize, textOf } from "./tree.js";

export function wireDialogs(take) {
  $("open-history").addEventListener("click", () => {
    drawHistory(take);
    $("history").showModal();
  });
  $("forget").addEventListener("click", () => {
    removeUnnamed();
    drawHistory(take);
  });
  $("save-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("save-name").value.trim();
    if (!name) return;
    addToHistory(path(), state.sides.A, name);
    $("save-name").value = "";
    drawHistory(take);
  });
  $("open-share").addEventListener("click", () => {
    drawShareOptions();
    $("share").showModal();
  });
  for (const close of document.querySelectorAll("dialog .close")) close.addEventListener("click", () => close.closest("dialog").close());
}

function drawHistory(take) {
  const entries = savedTexts();
  const none = el("li", { className: "quiet" }, "Nothing yet.");
  $("entries").replaceChildren(...(entries.length ? entries.map((entry) => historyItem(entry, take)) : [none]));
  $("forget").hidden = entries.every(({ name }) => name);
  $("save").disabled = !path().length;
}

function historyItem(entry, take) {
  const words = textOf(entry.path.map((item) => ({ text: Array.isArray(item) ? item[0] : item }))).replace(/\s+/g, " ").trim();
  const when = new Date(entry.at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const title = entry.name ? [el("b", {}, entry.name)] : [];
  const open = button("", () => {
    $("history").close();
    take(entry);
  }, { className: "open" });
  open.append(...title, el("span", {}, words.slice(0, 140)), el("small", {}, `${entry.model}, ${when}`));
  const remove = button("✕", () => {
    removeText(entry);
    drawHistory(take);
  }, { className: "plain", "aria-label": `Delete ${entry.name || words.slice(0, 30)}` });
  return el("li", {}, open, remove);
}

const sharedState = () => ({ path: serialize(path()), ...state.sides.A, ...(state.comparing && { b: state.sides.B }) });

const COPIES = {
  "Copy link": async (base) => `${base}${await toFragment(sharedState())}`,
  "Copy as curl": async (base) => asCurl(await readableRequest(state.shown), base),
  "Copy as Python": async (base) => asPython(await readableRequest(state.shown), base),
  "Copy as command line": async () => {
    const side = state.sides[state.shown];
    return asCommand(await readableRequest(state.shown), side.settings, infoOf(side.model));
  },
};

const SAVES = {
  "Save as page": ["gpt2.html", "text/html", async () => asPage(await collect(state.shown))],
  "Save as image": ["gpt2.png", "image/png", async () => asPicture(await collect(state.shown))],
  "Save as JSON": ["gpt2.json", "application/json", async () => JSON.stringify(await collect(state.shown), null, 1)],
  "Save as text": ["gpt2.txt", "text/plain", async () => textOf(path(state.shown))],
};

async function save(file, type, make) {
  try {
    download(file, type, await make());
    $("copied").textContent = `Saved as ${file}.`;
  } catch (error) {
    $("copied").textContent = error.message;
  }
}

function drawShareOptions() {
  const base = new URL(".", location.href).href;
  const copies = Object.entries(COPIES).map(([name, make]) => button(name, () => copyAndPreview(() => make(base))));
  const saves = Object.entries(SAVES).map(([name, [file, type, make]]) => button(name, () => save(file, type, make)));
  $("choices").replaceChildren(...copies);
  $("saves").replaceChildren(...saves);
  const { length } = keptHeads(infoOf(state.sides[state.shown].model)), heads = length === 1 ? "1 head" : `${length} heads`;
  $("exported").textContent = `The page needs no server: it holds the text, probabilities and alternatives, and the attention of ${heads}. Add heads under Attention, Whole matrices.`;
  $("preview").hidden = true;
  $("copied").textContent = "";
}

async function copyAndPreview(make) {
  try {
    const text = await make();
    $("preview").textContent = text;
    $("preview").hidden = false;
    $("copied").textContent = (await copy(text)) ? "Copied." : "The browser does not allow copying: select the text above.";
  } catch (error) {
    $("copied").textContent = error.message;
  }
}
