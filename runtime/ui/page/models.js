/** Bundle, engine and LoRAs: what a job runs on. Another bundle brings other stages, and so other settings. */

import {$, ask, changed, make, namedFields, onChange, page, setField, store, stored, valueOf} from "./dom.js";
import {complain} from "./messages.js";
import {buildPictures} from "./pictures.js";
import {buildSettings, setDefaults} from "./settings.js";
import {buildSizes, setDefaultSize} from "./sizes.js";

const STRENGTH = {min: -2, max: 2, step: 0.05};

/** Build the pickers, with the choice of the last visit where it is still there, and load the chosen bundle. */
export async function buildModels() {
  const {bundles, loras, chosen_loras, bundle, engine} = page.server;
  const last = stored("choice");
  $("bundle").replaceChildren(...bundles.map(value => make("option", {value}, value)));
  $("bundle").value = bundles.includes(last.bundle) ? last.bundle : bundle;
  $("lora").append(make("option", {value: ""}, "Add a LoRA"), ...loras.map(value => make("option", {value}, value)));
  $("lora-field").hidden = !loras.length;
  $("no-loras").hidden = loras.length > 0;
  const remembered = last.loras?.filter(({name}) => loras.includes(name));
  for (const lora of remembered ?? chosen_loras) addLora(lora);
  await loadBundle(last.engine ?? engine);
  setDefaultSize();
}

/** Ask for the chosen bundle, and build what depends on it. */
async function loadBundle(engine) {
  page.info = await ask(`/api/bundles/${encodeURIComponent($("bundle").value)}`);
  const {engines} = page.info;
  const able = [...new Set([page.server.engine, ...engines])];
  $("engine").replaceChildren(...able.map(value => make("option", {value}, value)));
  $("engine").value = able.includes(engine) ? engine : page.server.engine;
  buildSettings();
  buildPictures();
  buildSizes();
  setDefaults();
}

/** Take the form's values along to another bundle; a size that was the old default becomes the new one. */
async function changeBundle() {
  const kept = Object.fromEntries(namedFields().map(field => [field.name, valueOf(field)]));
  const before = Object.values(page.info.defaults)[0];
  try { await loadBundle($("engine").value); }
  catch (error) { $("bundle").value = page.info.name; return complain(error.message); }
  for (const field of namedFields()) if (field.name in kept && !field.disabled) setField(field, kept[field.name]);
  if (Number(kept.width) === before.width && Number(kept.height) === before.height) setDefaultSize();
  changed();
}

function addLora({name, strength = 1}) {
  if (chosenLoras().some(lora => lora.name === name)) return;
  const id = `lora-strength-${$("loras").children.length}-${Date.now()}`;
  const number = make("input", {type: "number", id, step: "any", inputMode: "decimal", value: strength,
    ariaLabel: `Strength of ${name}`});
  const slider = make("input", {type: "range", ...STRENGTH, value: strength, tabIndex: -1, ariaHidden: "true"});
  slider.addEventListener("input", () => { number.value = slider.value; changed(); });
  const remove = make("button", {type: "button", className: "icon", ariaLabel: `Remove ${name}`, title: "Remove"}, "×");
  const row = make("li", {className: "lora"}, make("span", {title: name}, name), slider, number, remove);
  row.dataset.name = name;
  remove.addEventListener("click", () => { row.remove(); changed(); $("lora").focus(); });
  $("loras").append(row);
}

const chosenLoras = () => [...$("loras").children].map(row =>
  ({name: row.dataset.name, strength: row.querySelector("[type=number]").value.trim()}));

/** What the jobs of the form run on, as a request names it. */
export const choice = () => ({bundle: $("bundle").value, engine: $("engine").value, loras: chosenLoras()});

$("bundle").addEventListener("change", changeBundle);
$("engine").addEventListener("change", changed);
$("lora").addEventListener("change", () => {
  if ($("lora").value) addLora({name: $("lora").value});
  $("lora").value = "";
  changed();
});

onChange(() => {
  const {bundle, engine, loras} = choice();
  const more = loras.length ? ` · ${loras.length} LoRA${loras.length > 1 ? "s" : ""}` : "";
  $("about").textContent = $("models-count").textContent = `${bundle} · ${engine}${more}`;
  $("merging").hidden = !loras.length;
  store("choice", {bundle, engine, loras});
});
