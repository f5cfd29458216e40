/** One image with its settings, in a dialog. */

import {$, make, onImages, page, sentence} from "./dom.js";
import {NAMES} from "./settings.js";

const ALWAYS = ["seed", "prior_steps", "decoder_steps", "prior_guidance", "sampler", "engine"];

let viewed = null;
let among = [];     // images that "newer" and "older" lead to

export const viewedImage = () => viewed;

export function view(image, images = [image]) {
  viewed = image;
  among = images;
  $("viewer-image").src = image.url;
  $("viewer-image").alt = image.settings.prompt || image.name;
  $("viewer-name").textContent = image.name;
  $("viewer-prompt").textContent = image.settings.prompt || "(no prompt)";
  $("viewer-settings").replaceChildren(
    ...factsOf(image).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  $("download").href = image.url;
  $("download").download = image.name;
  const at = place();
  $("newer").disabled = at <= 0;
  $("older").disabled = at < 0 || at === among.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}

/** Name and text of the settings worth reading: some always, the others where they are not the default. */
function factsOf(image) {
  const {prompt, negative, width, height, created_by, vqgan_scale, ...rest} = image.settings;
  const usual = page.info.defaults[rest.sampler] || {};
  const facts = [["Generated", new Date(image.time * 1000).toLocaleString([], {dateStyle: "medium", timeStyle: "short"})], ["Size", `${image.width}×${image.height}`]];
  if (negative) facts.push(["Negative prompt", negative]);
  for (const [name, value] of Object.entries(rest)) {
    if (name === "index" || (name === "batch" && value === 1) || (name === "strength" && !rest.init_image)) continue;
    if (ALWAYS.includes(name) || String(value) !== String(usual[name] ?? "")) {
      facts.push([factName(name), factText(name, value, rest)]);
    }
  }
  if (image.odd.length) facts.push(["Not understood", image.odd.join(", ")]);
  return facts;
}

const factName = name => NAMES[name] || {init_image: "Start picture", loras: "LoRAs"}[name] || sentence(name.replaceAll("_", " "));

function factText(name, value, {index}) {
  if (name === "batch") return `image ${(index ?? 0) + 1} of ${value}`;
  if (name === "loras") return value.map(lora => `${lora.name} ${lora.strength ?? 1}`).join(", ");
  if (value && value.file) return (value.name ? `${value.name}: ` : "") + value.file.replace(/^([0-9a-f]{8})[0-9a-f]{56}$/, "$1…");
  if (Array.isArray(value)) return value.map(each => factText("", each, {})).join(", ");
  return value === true ? "yes" : String(value);
}

const place = () => among.findIndex(({url}) => url === viewed.url);

function turn(by) {
  const next = among[place() + by];
  if (next) view(next, among);
}

export const closeViewer = () => $("viewer").close();

$("close").addEventListener("click", closeViewer);
$("viewer").addEventListener("click", event => { if (event.target === $("viewer")) closeViewer(); });
$("newer").addEventListener("click", () => turn(-1));
$("older").addEventListener("click", () => turn(1));
$("viewer").addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
  if (event.key === "Delete") $("viewer").querySelector("[data-do=remove]").click();
});

onImages(gone => {
  if (!gone || !$("viewer").open || viewed.url !== gone.url) return;
  const at = place();
  among = among.filter(({url}) => url !== gone.url);
  if (among.length) view(among[Math.min(at, among.length - 1)], among); else closeViewer();
});
