/** The size of the image: width and height, and buttons for common proportions. */

import {$, changed, make, onChange, page} from "./dom.js";
import {defaults} from "./settings.js";

const SHAPES = [[1, 1], [4, 3], [3, 2], [16, 9], [3, 4], [2, 3], [9, 16]];
const NEAR = 0.02;   // of the logarithm of two proportions that count as one

/** Width and height of about the default's area, with the proportions of `ratio`. */
function sidesFor(ratio) {
  const {width, height} = defaults();
  const {min, max, step} = page.info.limits.side;
  const by = Math.max(step, width >= 512 ? 64 : step);
  const area = Math.sqrt(width * height);
  return [area * Math.sqrt(ratio), area / Math.sqrt(ratio)]
    .map(side => Math.min(max, Math.max(min, Math.round(side / by) * by)));
}

function setSides([width, height]) {
  $("width").value = width;
  $("height").value = height;
}

/** Give the image the proportions of a picture. */
export function sizeLike(width, height) {
  setSides(sidesFor(width / height));
  changed();
}

export function setDefaultSize() {
  const {width, height} = Object.values(page.info.defaults)[0];
  setSides([width, height]);
}

export function buildSizes() {
  for (const name of ["width", "height"]) Object.assign($(name), page.info.limits.side);
  $("images").max = page.info.limits.images;
  $("shapes").replaceChildren(...SHAPES.map(([w, h]) => {
    const input = make("input", {type: "radio", name: "shape", value: `${w}:${h}`, className: "unseen"});
    input.dataset.ratio = w / h;
    const outline = make("i", {ariaHidden: "true"});
    const scale = 18 / Math.max(w, h);
    outline.style.width = `${w * scale}px`;
    outline.style.height = `${h * scale}px`;
    input.addEventListener("change", () => { setSides(sidesFor(w / h)); changed(); });
    return make("label", {}, input, outline, make("span", {}, `${w}:${h}`));
  }));
}

$("swap").addEventListener("click", () => { setSides([$("height").value, $("width").value]); changed(); });

onChange(() => {
  const ratio = Math.log($("width").value / $("height").value);
  for (const input of $("shapes").querySelectorAll("input")) {
    const sides = sidesFor(Number(input.dataset.ratio));   // rounded, they differ a little from the proportions
    input.checked = Math.abs(Math.log(sides[0] / sides[1]) - ratio) < NEAR;
  }
});
