/** Small helpers: elements, requests to the server, and the event by which modules hear of a change. */

export const $ = id => document.getElementById(id);
export const form = $("form");

/** What all modules know: `server` is what the server offers, `info` describes the chosen bundle, and `place` is
 * {index, batch, seed} of an image in the form that was generated in a batch. */
export const page = {server: null, info: null, place: null};

/** An element with properties and children; text is always text, never markup. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export async function ask(path, options) {
  let reply;
  try { reply = await fetch(path, options); }
  catch { throw new Error("The server does not answer. Is cascadekit ui still running?"); }
  const content = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Error(content.error || `The server answered ${reply.status}.`);
  return content;
}

export const post = (path, value = {}) =>
  ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(value)});

export const sentence = text => text.charAt(0).toUpperCase() + text.slice(1);
export const clock = seconds => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** Tell every module that fields of the form have changed. */
export const changed = () => form.dispatchEvent(new Event("changed"));
export const onChange = update => form.addEventListener("changed", update);

/** Tell every module that images were added, or that one is gone. */
export const imagesChanged = (gone = null) => document.dispatchEvent(new CustomEvent("images", {detail: gone}));
export const onImages = update => document.addEventListener("images", event => update(event.detail));

/** The fields of the form that a request has; presets only fill in others. */
export const namedFields = () => [...form.elements].filter(field => field.name && field.type !== "radio");

/** A field's value in the form: text, or whether a box is checked. */
export const valueOf = field => field.type === "checkbox" ? field.checked : field.value.trim();

export function setField(field, value) {
  if (field.type === "checkbox") field.checked = value === true;
  else field.value = Array.isArray(value) ? value.join(", ") : value ?? "";
}

/** The stored value of this browser under a name, and its replacement. Private windows keep none. */
export function stored(name) {
  try { return JSON.parse(localStorage.getItem(`cascadekit ${name}`)) ?? {}; } catch { return {}; }
}

export function store(name, value) {
  try { localStorage.setItem(`cascadekit ${name}`, JSON.stringify(value)); } catch { /* private windows */ }
}
