/** The images of the last job, one of them large, and the line of actions below it. */

import {$, make, onImages} from "./dom.js";
import {view} from "./viewer.js";

let images = [];
let selected = null;

/** The image that the actions below it are about. */
export const selectedImage = () => selected;

/** Previews of the images in the making. */
export function showDrafts(urls) {
  show(urls.map(url => make("img", {src: url, className: "draft", alt: "Preview"})));
}

export function clearResult(title, text) {
  images = [];
  selected = null;
  show([]);
  $("strip").hidden = $("result").hidden = true;
  $("empty-title").textContent = title;
  $("empty-text").textContent = text;
}

export function showImages(found) {
  clearResult("Nothing to show", "The last job ended before there was an image.");
  images = found;
  if (images.length) select(images[0]);
}

function show(elements) {
  $("shown").replaceChildren(...elements);
  $("shown").classList.toggle("many", elements.length > 1);
  $("shown").hidden = !elements.length;
  $("empty").hidden = elements.length > 0;
}

function select(image) {
  selected = image;
  const picture = make("img", {src: image.url, alt: image.settings.prompt || image.name, width: image.width, height: image.height});
  show([make("button", {type: "button", ariaLabel: `Open ${image.name}`, onclick: () => view(image)}, picture)]);
  $("result").hidden = false;
  $("result-name").textContent = `${image.name} · ${image.width} × ${image.height} · seed ${image.settings.seed ?? "unknown"}`;
  $("result-download").href = image.url;
  $("result-download").download = image.name;
  showStrip();
}

function showStrip() {
  $("strip").hidden = images.length < 2;
  $("strip").replaceChildren(...images.map(image => make("button", {
    type: "button", ariaLabel: `Show ${image.name}`, ariaPressed: String(image === selected), onclick: () => {
      select(image);
      $("strip").children[images.indexOf(image)].focus();
    },
  }, make("img", {src: image.url, alt: ""}))));
}

onImages(gone => {
  const at = gone ? images.findIndex(({url}) => url === gone.url) : -1;
  if (at < 0) return;
  images = images.filter((image, place) => place !== at);
  if (!images.length) clearResult("Deleted", `${gone.name} is in the trash.`);
  else if (selected.url === gone.url) select(images[Math.min(at, images.length - 1)]);
  else showStrip();
});
