/** The gallery: the images of the folder with captions, newest first, searched by words. */

import {$, ask, make, onImages} from "./dom.js";
import {complain} from "./messages.js";
import {removeImage} from "./trash.js";
import {view} from "./viewer.js";

const MORE = 96;      // images that "Show more" adds
const PAUSE = 200;    // milliseconds without a key before a search

let shownCount = 48;
let images = [];
let asked = 0;        // of the questions to the server; only the last one's answer is shown
let typing = 0;

export async function loadGallery() {
  const search = $("search").value.trim();
  const question = ++asked;
  let found;
  try { found = await ask(`/api/images?count=${shownCount}&search=${encodeURIComponent(search)}`); }
  catch (error) { return complain(error.message); }
  if (question !== asked) return;
  images = found.images;
  $("more").hidden = !found.more;
  $("nothing").hidden = images.length > 0;
  $("nothing").textContent = search ? `No image has “${search}” in its prompt, name or seed.`
    : "No images yet. What you generate is kept here, with the settings that made it.";
  $("search-field").hidden = !search && !images.length;
  if (search) $("found").textContent = `${images.length}${found.more ? " and more" : ""} found`;
  $("found").hidden = !search;
  const known = new Map([...$("grid").children].map(item => [item.dataset.url, item]));
  $("grid").replaceChildren(...images.map(image => known.get(image.url) || thumbnail(image)));
}

function thumbnail(image) {
  const text = image.settings.prompt || "(no prompt)";
  const open = make("button", {type: "button", className: "thumb", title: text, ariaLabel: `Open ${image.name}: ${text}`,
    onclick: () => view(image, images)}, make("img", {src: image.url, alt: "", loading: "lazy"}));
  const remove = make("button", {type: "button", className: "icon remove", title: "Delete",
    ariaLabel: `Delete ${image.name}`, onclick: () => removeImage(image)}, "×");
  const seed = image.settings.seed === undefined ? "" : ` · seed ${image.settings.seed}`;
  const item = make("li", {}, open, remove, make("p", {className: "caption", ariaHidden: "true"}, text),
    make("p", {className: "soft small"}, `${image.width} × ${image.height}${seed}`));
  item.dataset.url = image.url;
  return item;
}

$("more").addEventListener("click", () => { shownCount += MORE; loadGallery(); });
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(loadGallery, PAUSE);
});
onImages(loadGallery);
