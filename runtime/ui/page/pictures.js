/** Pictures that an image follows: image prompts, a start picture, a mask, and those of the ControlNets. */

import {$, ask, changed, make, onChange, page, sentence, store, stored} from "./dom.js";
import {complain, notice} from "./messages.js";
import {openPainter} from "./painter.js";
import {buildField} from "./settings.js";
import {sizeLike} from "./sizes.js";

export const zones = {};

const CONTROL_TEXT = {
  canny: ["Canny", "a picture whose edges to follow"],
  edges: ["Edges", "a picture of edges, white on black"],
  inpainting: ["Inpainting", "the picture around the mask"],
  super_resolution: ["Super resolution", "a small picture to enlarge"],
};

/** Build a zone for each kind of picture that the bundle can follow. Pictures of zones that are built again stay. */
export function buildPictures() {
  const before = Object.fromEntries(Object.entries(zones).map(([name, {items}]) => [name, items]));
  for (const name of Object.keys(zones)) delete zones[name];
  $("zones").replaceChildren();
  const can = page.info.features;
  if (can.image_prompts) addZone("image_prompts", "Image prompts", "Pictures to follow, beside the prompt", {many: true});
  if (can.init_image) addZone("init_image", "Start picture", "A picture to vary", {strength: [0, 1, 0.05, 0.8]});
  if (can.mask) {
    addZone("mask", "Mask", "White where to generate anew", {needs: ["init_image", "control inpainting"]});
    const paint = make("button", {type: "button", id: "paint", onclick: () => openPainter(masked(), usePainted)}, "Paint a mask");
    zones.mask.element.insertBefore(paint, zones.mask.list);
  }
  for (const name of can.controls) {
    const [label, text] = CONTROL_TEXT[name];
    addZone(`control ${name}`, `ControlNet: ${label}`, sentence(text), {strength: [0, 2, 0.05, 1]});
  }
  if (!Object.keys(zones).length) {
    $("zones").append(make("p", {className: "hint"}, "This bundle follows words only. Export the model with its image "
      + "encoder, effnet encoder or ControlNets to give it pictures."));
  }
  for (const [name, zone] of Object.entries(zones)) {
    zone.items = before[name] ?? [];
    showItems(zone);
  }
}

function addZone(name, label, text, {many = false, needs = null, strength = null} = {}) {
  const input = make("input", {type: "file", accept: "image/*", multiple: many, className: "unseen", ariaLabel: label});
  const drop = make("label", {className: "drop"}, input, make("span", {}, `${text}. Drop ${many ? "them" : "it"} here, or choose a file.`));
  const items = make("ul", {className: "items", ariaLabel: `${label}: chosen`});
  const element = make("div", {className: "zone"}, make("span", {className: "name"}, label), drop, items);
  const zone = zones[name] = {name, label, many, needs, input, items: [], list: items, element};
  if (strength) {
    const [min, max, step, value] = strength;
    const row = buildField(name === "init_image" ? "strength" : `${name} strength`, "Strength", {slide: [min, max, step]});
    zone.strength = row.lastChild;
    zone.strength.value = value;
    zone.usual = value;
    element.append(row);
  }
  input.addEventListener("change", () => { take(zone, input.files); input.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, event => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover" && !input.disabled);
      if (kind === "drop" && !input.disabled) take(zone, event.dataTransfer.files);
    });
  }
  $("zones").append(element);
}

/** Upload files into a zone. A start picture gives the image its proportions. */
async function take(zone, files) {
  complain("");
  for (const file of zone.many ? files : [...files].slice(0, 1)) {
    try {
      put(zone, {id: await upload(file), file: file.name});
      if (zone.name === "init_image") await takeProportions(zone.items[0]);
    } catch (error) { complain(`${file.name}: ${error.message}`); }
  }
}

async function takeProportions(item) {
  const picture = make("img", {src: urlOf(item)});
  await picture.decode();
  sizeLike(picture.naturalWidth, picture.naturalHeight);
  notice(`The size follows the start picture: ${$("width").value} × ${$("height").value}.`);
}

export async function upload(file) {
  const most = page.server.picture_bytes;
  if (file.size > most) throw new Error(`larger than ${most / 2 ** 20} MB`);
  const headers = {"Content-Type": "application/octet-stream"};
  return (await ask("/api/pictures", {method: "POST", headers, body: file})).id;
}

export function put(zone, item) {
  zone.items = [...(zone.many ? zone.items.filter(({id}) => id !== item.id) : []), item];
  showItems(zone);
  changed();
}

export const urlOf = item => `/api/pictures/${item.id}`;

function showItems(zone) {
  zone.list.replaceChildren(...zone.items.map(item => {
    const remove = make("button", {type: "button", ariaLabel: `Remove ${item.file}`, title: "Remove"}, "×");
    remove.addEventListener("click", () => {
      zone.items = zone.items.filter(other => other !== item);
      showItems(zone);
      changed();
      zone.input.focus();
    });
    return make("li", {}, make("img", {src: urlOf(item), alt: item.file, title: item.file}), remove);
  }));
}

export function clearZones() {
  for (const zone of Object.values(zones)) {
    zone.items = [];
    if (zone.strength) zone.strength.value = zone.usual;
    showItems(zone);
  }
  changed();
}

/** The picture that a mask is for. */
const masked = () => zones.mask.needs.map(name => zones[name]?.items[0]).find(item => item);

async function usePainted(file) {
  complain("");
  try { put(zones.mask, {id: await upload(file), file: "painted mask"}); }
  catch (error) { complain(error.message); }
}

/** Pictures as a request names them. */
export function pictured() {
  const body = {controls: []};
  for (const [name, zone] of Object.entries(zones)) {
    const ids = zone.items.map(({id}) => id);
    if (!ids.length || zone.input.disabled) continue;
    const control = name.startsWith("control ") && name.slice(8);
    if (control) body.controls.push({name: control, picture: ids[0], strength: zone.strength.value.trim()});
    else body[name] = zone.many ? ids : ids[0];
  }
  if (zones.init_image?.items.length) body.strength = $("strength").value.trim();
  return body;
}

/** Put the pictures of the last visit back that the server still has. */
export async function recallPictures() {
  const gone = [];
  for (const [name, items] of Object.entries(stored(`${page.info.name} pictures`))) {
    for (const item of zones[name] ? items : []) {
      const {present} = await ask(`${urlOf(item)}/present`);
      if (present) put(zones[name], item); else gone.push(item.file);
    }
  }
  if (gone.length) notice(`Not here any more: ${gone.join(", ")}; add it again.`);
  remembering = true;
}

let remembering = false;   // not before the last visit's pictures are back

onChange(() => {
  const all = Object.entries(zones);
  $("pictures-count").textContent = all.reduce((sum, [, zone]) => sum + zone.items.length, 0) || "";
  for (const [, zone] of all) {
    if (zone.needs) zone.input.disabled = $("paint").disabled = !masked();
    const strength = zone.element.querySelector(".slide");
    if (strength) strength.hidden = !zone.items.length;
  }
  if (remembering) store(`${page.info.name} pictures`, Object.fromEntries(all.map(([name, {items}]) => [name, items])));
});
