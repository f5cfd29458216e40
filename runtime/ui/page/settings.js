/** The settings of the sampling: a table of fields, their defaults, and the fields that the table makes. */

import {$, changed, make, onChange, page, setField, valueOf} from "./dom.js";

// name, label, and: slide [from, to, by] beside a number, choices, a list, or a check with what it means; gdf: a field
// of that sampler alone.
const GROUPS = [
  ["Prior", "stage C composes the image", [
    ["prior_steps", "Prior steps", {slide: [1, 60, 1]}],
    ["prior_guidance", "Guidance scale", {slide: [0, 12, 0.1]}],
    ["prior_shift", "Noise shift", {slide: [0.5, 8, 0.1], gdf: true}],
    ["prior_timesteps", "Timesteps", {list: "or a list: 1, 0.6, 0.2, 0"}]]],
  ["Decoder", "stage B adds the detail", [
    ["decoder_steps", "Decoder steps", {slide: [1, 30, 1]}],
    ["decoder_guidance", "Guidance scale", {slide: [0, 4, 0.1]}],
    ["decoder_shift", "Noise shift", {slide: [0.5, 8, 0.1], gdf: true}],
    ["decoder_timesteps", "Timesteps", {list: "or a list: 1, 0.5, 0"}]]],
  ["Sampling", "", [
    ["sampler", "Sampler", {choices: info => Object.keys(info.defaults)}],
    ["rescale", "Rescale guidance", {slide: [0, 1, 0.05], gdf: true}],
    ["size_policy", "Size policy", {choices: info => info.size_policies}]]],
  ["Reading the prompt", "", [
    ["weighted", "Emphasis", {check: "(words:1.2) count more, [words] less"}],
    ["long_prompts", "Long prompts", {check: "beyond CLIP's 77 tokens, in chunks"}]]],
];

/** Labels of the settings, where a group's name is needed to tell two apart. */
export const NAMES = Object.fromEntries(GROUPS.flatMap(([group, , fields]) => fields.map(([name, label]) =>
  [name, /^(Guidance|Noise|Timesteps)/.test(label) ? `${group} ${label.toLowerCase()}` : label])));

export function buildSettings() {
  const sets = GROUPS.map(([group, about, fields]) =>
    make("fieldset", {}, make("legend", {}, group, make("span", {}, about && ` — ${about}`)),
      ...fields.map(([name, label, kind]) => buildField(name, label, kind))));
  const reset = make("button", {type: "button", onclick: () => { setDefaults(); changed(); }}, "Back to the defaults");
  $("groups").replaceChildren(...sets, buildPreviews(), reset);
  $("sampler").addEventListener("change", changeSampler);
}

function buildPreviews() {
  const has = page.info.features.previews.includes("prior");
  const set = make("fieldset", {}, make("legend", {}, "Live preview"),
    buildCheck("preview_prior", "Prior", has ? "every step, through the previewer"
      : "this bundle has no previewer; export the model with one to see the prior's steps", has),
    buildCheck("preview_decoder", "Decoder", "every step, through the VQGAN, which takes a moment each", true));
  set.querySelectorAll("input").forEach(box => { box.dataset.local = ""; box.checked = !box.disabled; });
  return set;
}

export function buildField(name, label, kind) {
  if (kind.check) return buildCheck(name, label, kind.check, true);
  const row = make("div", {className: "slide"}, make("label", {htmlFor: name, className: "small"}, label));
  if (kind.gdf) row.dataset.gdf = "";
  if (kind.choices) {
    const options = kind.choices(page.info).map(value => make("option", {value}, value));
    row.append(make("select", {id: name, name, className: "wide"}, ...options));
  } else if (kind.list) {
    row.append(make("input", {id: name, name, className: "wide", placeholder: kind.list, autocomplete: "off"}));
    row.lastChild.dataset.list = "";
  } else {
    const [min, max, step] = kind.slide;
    const slider = make("input", {type: "range", min, max, step, tabIndex: -1, ariaHidden: "true"});
    const number = make("input", {type: "number", id: name, name, step: "any", min: 0, inputMode: "decimal"});
    slider.addEventListener("input", () => { number.value = slider.value; changed(); });
    row.append(slider, number);
  }
  return row;
}

function buildCheck(name, label, about, able) {
  const box = make("input", {type: "checkbox", id: name, name, disabled: !able});
  return make("label", {className: "check"}, box, make("span", {}, label, make("small", {}, about)));
}

export const settingFields = () =>
  [...$("groups").querySelectorAll("[name]")].filter(field => !("local" in field.dataset));
export const defaults = () => page.info.defaults[$("sampler").value];
export const defaultOf = (field, of = defaults()) =>
  field.type === "checkbox" ? of[field.name] : String(of[field.name] ?? "");

function isDefault(field, of) {
  const [value, usual] = [valueOf(field), defaultOf(field, of)];
  return value === usual || (value !== "" && usual !== "" && Number(value) === Number(usual));
}

export function setDefaults() {
  $("sampler").value = Object.keys(page.info.defaults)[0];
  for (const field of settingFields()) setField(field, defaultOf(field));
}

/** Another sampler has other defaults: fields that were left at the old ones take the new ones. */
let lastSampler;
function changeSampler() {
  for (const field of settingFields()) {
    if (field.id !== "sampler" && isDefault(field, page.info.defaults[lastSampler])) setField(field, defaultOf(field));
  }
  changed();
}

onChange(() => {
  lastSampler = $("sampler").value;
  for (const row of $("groups").querySelectorAll("[data-gdf]")) row.hidden = $("sampler").value !== "gdf";
  for (const slider of document.querySelectorAll("#form input[type=range]")) {
    slider.value = slider.nextElementSibling.value;
  }
  const others = settingFields().filter(field => !field.closest("[hidden]") && !isDefault(field)).length;
  $("settings-count").textContent = others ? `${others} changed` : "";
});
