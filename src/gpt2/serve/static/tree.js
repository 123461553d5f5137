// A tree of typed text and generated tokens. A node is a generated token or a run of typed text; the text of the editor
// is the path from the root to the leaf. Editing never deletes generated tokens.
//
// generated: null for typed text, else {id, logprob, vocabulary, stale}. A stale log-probability is that of the token
// after another text: the server is asked for the new one. copy: made by an edit before the token, not by a model.

export function makeTree() {
  const root = makeNode(null, "");
  return { root, leaf: root };
}

function makeNode(parent, text, generated = null, copy = false) {
  return { parent, text, generated, copy, children: [], last: null };
}

export function add(parent, text, generated = null, copy = false) {
  const same = parent.children.find((child) => isSame(child, text, generated));
  const child = same ?? makeNode(parent, text, generated, copy);
  if (!same) parent.children.push(child);
  parent.last = child;
  return child;
}

// Appends text to the last token: the rest of a character, or text that was held back as a possible stop string.
export function appendToLeaf(leaf, text) {
  if (!leaf.generated) return add(leaf, text);
  const parent = leaf.children.length ? leaf.parent : forget(leaf);
  return add(parent, leaf.text + text, leaf.generated);
}

function isSame(child, text, generated) {
  if (!generated || !child.generated) return !generated && !child.generated && child.text === text;
  return child.text === text && child.generated.id === generated.id && child.generated.vocabulary === generated.vocabulary;
}

export function pathTo(node) {
  const path = [];
  for (let at = node; at.parent; at = at.parent) path.push(at);
  return path.reverse();
}

export const textOf = (path) => path.map((node) => node.text).join("");

// The leaf below a node, by the last used child of each node.
export function endOf(node) {
  while (node.last) node = node.last;
  return node;
}

export function goTo(tree, node) {
  for (let at = node; at.parent; at = at.parent) at.parent.last = at;
  tree.leaf = node;
}

// Returns to a leaf that an edit may have removed from the tree.
export function restore(tree, leaf) {
  removeEdited(pathTo(tree.leaf), null);
  let at = leaf;
  for (; at.parent; at = at.parent) if (!at.parent.children.includes(at)) at.parent.children.push(at);
  tree.root = at;
  goTo(tree, leaf);
}

// Updates the tree after an edit: the tokens before and after it are kept, and what lies between becomes typed text.
export function edit(tree, text) {
  const path = pathTo(tree.leaf), spans = spansOf(path), old = textOf(path);
  const before = countUnchanged(path, text);
  const start = before ? spans[before - 1].end : 0;
  const after = countUnchangedAfter(path.slice(before), text.slice(start));
  const tail = path.slice(path.length - after);
  let middle = text.slice(start, text.length - textOf(tail).length);
  while (tail.length && !tail[0].generated) middle += tail.shift().text;
  let kept = before ? path[before - 1] : tree.root;
  if (old === text) return;
  if (middle && kept.parent && !kept.generated && kept.children.every((child) => child === path[before] && isEdited(child))) {
    middle = kept.text + middle;
    removeEdited(path, kept);
    kept = forget(kept);
  } else removeEdited(path, kept);
  let leaf = middle ? add(kept, middle) : kept;
  for (const node of tail) leaf = add(leaf, node.text, { ...node.generated, stale: true }, true);
  leaf.last = null;
  tree.leaf = leaf;
}

// A node without text is part of a character, and is kept with it.
function countUnchanged(path, text) {
  let length = 0, count = 0;
  for (const [i, node] of path.entries()) {
    if (!text.startsWith(node.text, length)) break;
    length += node.text.length;
    if (node.text) count = i + 1;
  }
  return count;
}

function countUnchangedAfter(path, text) {
  let end = text.length, count = 0;
  for (const [i, node] of [...path].reverse().entries()) {
    if (!node.generated || !text.endsWith(node.text, end)) break;
    end -= node.text.length;
    if (node.text || count) count = i + 1;
  }
  return count;
}

const isEdited = (node) => !node.generated || node.copy;

// Removes what edits made and nothing else uses: text that was typed in between gets no branch.
function removeEdited(path, kept) {
  for (let i = path.length - 1; i >= 0 && path[i] !== kept; i--) {
    if (!isEdited(path[i]) || path[i].children.length) return;
    forget(path[i]);
  }
}

function forget(node) {
  const { parent } = node;
  parent.children = parent.children.filter((child) => child !== node);
  if (parent.last === node) parent.last = null;
  return parent;
}

// The start and end of each node of a path in the text.
export function spansOf(path) {
  let start = 0;
  return path.map((node) => ({ node, start, end: (start += node.text.length) }));
}

// Where each scored token begins in a text, in code units; the server counts characters. first: the tokens before it.
export function startsOf(tokens, first, text) {
  const ends = [0];
  for (const letter of text) ends.push(ends.at(-1) + letter.length);
  return tokens.slice(first).map(({ start }) => ends[start - tokens[first].start] ?? text.length);
}

// The nodes of the first characters of a path; typed text may be cut within a node.
export function nodesBefore(tree, path, length) {
  const nodes = [];
  for (const { node, start, end } of spansOf(path)) {
    if (end <= length) nodes.push(node);
    else if (start < length) nodes.push(add(nodes.at(-1) ?? tree.root, node.text.slice(0, length - start)));
    if (end >= length) break;
  }
  return nodes;
}

export const startsGenerated = (path) => !path.length || path[0].generated !== null;

// A path as plain data, and back.
export const serialize = (path) => path.map(({ text, generated }) => (generated ? [text, generated.id, generated.logprob, generated.vocabulary] : text));

export function deserialize(tree, items) {
  let at = tree.root;
  for (const item of items) {
    const [text, id, logprob, vocabulary] = Array.isArray(item) ? item : [item];
    if (typeof text !== "string") continue;
    const known = logprob === null ? null : Number(logprob);
    const generated = Number.isInteger(id) ? { id, logprob: known, vocabulary: String(vocabulary) } : null;
    if (text || generated) at = add(at, text, generated);
  }
  goTo(tree, at);
}
