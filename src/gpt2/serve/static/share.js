// Links, files, and the draft and history in the browser's storage.

import { el } from "./dom.js";
import { serialize, textOf } from "./tree.js";

const HISTORY = "gpt2-history", DRAFT = "gpt2-draft", MOST = 40;

export function toFragment(what) {
  const bytes = new TextEncoder().encode(JSON.stringify(what));
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return `#s=${btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

// Null if the fragment is not a valid link.
export function fromFragment(fragment) {
  if (!fragment.startsWith("#s=")) return null;
  try {
    const letters = atob(fragment.slice(3).replaceAll("-", "+").replaceAll("_", "/"));
    const what = JSON.parse(new TextDecoder().decode(Uint8Array.from(letters, (letter) => letter.charCodeAt(0))));
    return Array.isArray(what?.path) ? what : null;
  } catch {
    return null;
  }
}

export function asJson(path, side) {
  const tokens = path.map(({ text, generated }) => (generated ? { text, id: generated.id, logprob: generated.logprob } : { text }));
  return JSON.stringify({ model: side.model, settings: side.settings, text: textOf(path), tokens }, null, 2);
}

export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // storage is full or not allowed: the page works without it
  }
}

export const draft = () => read(DRAFT, null);
export const keepDraft = (what) => write(DRAFT, what);

export function history() {
  const entries = read(HISTORY, []);
  return Array.isArray(entries) ? entries.filter((entry) => Array.isArray(entry?.path)) : [];
}

export const clearHistory = () => write(HISTORY, []);

export function addToHistory(path, side) {
  const entry = { at: Date.now(), path: serialize(path), model: side.model, settings: side.settings };
  const others = history().filter((old) => JSON.stringify(old.path) !== JSON.stringify(entry.path));
  write(HISTORY, [entry, ...others].slice(0, MOST));
}
