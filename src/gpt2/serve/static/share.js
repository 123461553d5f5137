// Links, files, and the draft and saved texts in the browser's storage.

import { el } from "./dom.js";
import { serialize } from "./tree.js";

const HISTORY = "gpt2-history", DRAFT = "gpt2-draft", MOST = 40;

const toBase64 = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const fromBase64 = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
const through = async (bytes, stream) => new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());

// A link holds the text once, and of each token its length in the text, its id and its log-probability to one decimal;
// vocabularies once each. All of it is compressed.
function pack({ path, ...rest }) {
  const vocabularies = [], lengths = [], ids = [], logprobs = [];
  for (const [text, id, logprob, vocabulary] of path.map((item) => (Array.isArray(item) ? item : [item]))) {
    lengths.push(text.length);
    if (id === undefined) {
      ids.push(-1);
      continue;
    }
    if (!vocabularies.includes(vocabulary)) vocabularies.push(vocabulary);
    ids.push(vocabularies.length > 1 ? [id, vocabularies.indexOf(vocabulary)] : id);
    logprobs.push(logprob === null ? null : Math.round(logprob * 10));
  }
  const text = path.map((item) => (Array.isArray(item) ? item[0] : item)).join("");
  return { ...rest, v: 2, text, lengths, ids, logprobs, vocabularies };
}

function unpack({ text, lengths, ids, logprobs, vocabularies, ...rest }) {
  let at = 0, known = 0;
  const path = lengths.map((length, i) => {
    const piece = text.slice(at, (at += length));
    const [id, which] = Array.isArray(ids[i]) ? ids[i] : [ids[i], 0];
    if (id === -1) return piece;
    const logprob = logprobs[known++];
    return [piece, id, logprob === null ? null : logprob / 10, vocabularies[which]];
  });
  return { ...rest, path };
}

export async function toFragment(what) {
  const bytes = new TextEncoder().encode(JSON.stringify(pack(what)));
  return `#z=${toBase64(await through(bytes, new CompressionStream("deflate-raw")))}`;
}

const MAX_BYTES = 2 ** 22; // of an unpacked link

// Null if the fragment is not a valid link.
export async function fromFragment(fragment) {
  const [, kind, data] = fragment.match(/^#([sz])=(.*)$/) ?? [];
  if (!kind) return null;
  try {
    const bytes = kind === "s" ? fromBase64(data) : await inflate(fromBase64(data));
    const what = JSON.parse(new TextDecoder().decode(bytes));
    const full = what?.v === 2 ? unpack(what) : what;
    return Array.isArray(full?.path) ? full : null;
  } catch {
    return null;
  }
}

async function inflate(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
  const parts = [];
  for (let length = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > MAX_BYTES) throw new RangeError("the link is too long");
    parts.push(value);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

export function download(name, type, content) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
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

export function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // storage is full or not allowed: the page works without it
  }
}

export const draft = () => read(DRAFT, null);
export const keepDraft = (what) => write(DRAFT, what);

// Saved texts: those with a name, and the last ones without.
export function savedTexts() {
  const entries = read(HISTORY, []);
  return Array.isArray(entries) ? entries.filter((entry) => Array.isArray(entry?.path)) : [];
}

const keep = (entries) => {
  const named = entries.filter(({ name }) => name);
  write(HISTORY, [...named, ...entries.filter(({ name }) => !name)].slice(0, Math.max(MOST, named.length)));
};

export const removeUnnamed = () => keep(savedTexts().filter(({ name }) => name));
export const removeText = (entry) => keep(savedTexts().filter(({ at }) => at !== entry.at));

export function addToHistory(path, side, name = "") {
  const entry = { at: Date.now(), path: serialize(path), model: side.model, settings: side.settings, name };
  const isOther = (old) => (name ? old.name !== name : true) && (old.name || JSON.stringify(old.path) !== JSON.stringify(entry.path));
  keep([entry, ...savedTexts().filter(isOther)]);
}
