/** The form as a request, remembered between visits, and filled in from an image. */

import {$, changed, namedFields, onChange, page, setField, store, stored, valueOf} from "./dom.js";
import {complain, notice} from "./messages.js";
import {choice} from "./models.js";
import {clearZones, pictured, put, zones} from "./pictures.js";
import {defaultOf, settingFields} from "./settings.js";

/** The form as a request. Numbers go as text: the server reads them, without JavaScript's rounding. */
export function request() {
  const body = {previews: [], ...choice()};
  for (const field of namedFields()) {
    if (field.closest(".zone") || field.closest("[hidden]")) continue;
    const value = valueOf(field);
    if ("local" in field.dataset) { if (value) body.previews.push(field.name.slice("preview_".length)); }
    else if ("list" in field.dataset) { if (value) body[field.name] = value.split(",").map(part => part.trim()); }
    else if (value !== "" || field.name === "prompt") body[field.name] = value;
  }
  if (page.place) Object.assign(body, {index: page.place.index, batch: page.place.batch});
  return Object.assign(body, pictured());
}

/** True if nothing tells the image what to show. */
export const saysNothing = () => !$("prompt").value.trim() && !Object.values(zones).some(({items}) => items.length);

export function recall() {
  const kept = stored(page.info.name);
  for (const field of namedFields()) if (field.name in kept && !field.disabled) setField(field, kept[field.name]);
}

/** Put the settings of a finished image into the form; `seed` false leaves the seed open. */
export function useSettings(image, {seed = true} = {}) {
  const given = image.settings;
  complain("");
  if (given.sampler in page.info.defaults) $("sampler").value = given.sampler;
  for (const field of settingFields()) setField(field, given[field.name] ?? defaultOf(field));
  for (const name of ["prompt", "negative", "width", "height"]) $(name).value = given[name] ?? "";
  $("seed").value = seed ? given.seed ?? "" : "";
  $("images").value = 1;
  const lost = usePictures(given);
  page.place = seed && given.batch > 1 ? {index: given.index ?? 0, batch: given.batch, seed: $("seed").value} : null;
  changed();
  const more = lost.length ? ` Not here any more: ${lost.join(", ")}; add it again.` : "";
  notice(`The settings of ${image.name} are in the form.${more}`);
  return lost.length === 0;
}

/** Put the pictures of an image into their zones; returns the names of those that are gone. */
function usePictures(given) {
  clearZones();
  const lost = [];
  const back = (zone, value, strength) => {
    if (zone && value.picture) put(zone, {id: value.picture, file: value.file});
    else lost.push(value.file || "a picture");
    if (zone?.strength && strength !== undefined) zone.strength.value = strength;
  };
  for (const value of given.image_prompts || []) back(zones.image_prompts, value);
  if (given.init_image) back(zones.init_image, given.init_image, given.strength);
  if (given.mask) back(zones.mask, given.mask);
  for (const value of given.controls || []) back(zones[`control ${value.name}`], value, value.strength ?? 1);
  return lost;
}

onChange(() => {
  const {place} = page;
  if (place && ($("images").value !== "1" || $("seed").value !== place.seed)) page.place = null;
  $("place").hidden = !page.place;
  if (page.place) $("place").textContent = `image ${place.index + 1} of the ${place.batch} generated with this seed ×`;
  store(page.info.name, Object.fromEntries(namedFields().map(field => [field.name, valueOf(field)])));
});

$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed();
});
$("place").addEventListener("click", () => { page.place = null; changed(); $("seed").focus(); });
