/** Presets of quality: the steps of prior and decoder, relative to the defaults of the sampler. */

import {$, changed, make, onChange} from "./dom.js";
import {defaults} from "./settings.js";

const PRESETS = [["draft", "Draft", 0.5], ["standard", "Standard", 1], ["fine", "Fine", 2]];

const stepsOf = factor => ["prior_steps", "decoder_steps"].map(name => Math.ceil(defaults()[name] * factor));

function choose(factor) {
  [$("prior_steps").value, $("decoder_steps").value] = stepsOf(factor);
  $("prior_timesteps").value = $("decoder_timesteps").value = "";   // a list would replace the steps
  changed();
}

export function buildQuality() {
  $("qualities").replaceChildren(...PRESETS.map(([value, text, factor]) => {
    const input = make("input", {type: "radio", name: "quality", value, className: "unseen"});
    input.addEventListener("change", () => choose(factor));
    return make("label", {}, input, make("span", {}, text), make("small", {}));
  }));
}

onChange(() => {
  const steps = [$("prior_steps").value, $("decoder_steps").value].map(Number);
  const listed = $("prior_timesteps").value + $("decoder_timesteps").value;
  [...$("qualities").children].forEach((label, place) => {
    const [prior, decoder] = stepsOf(PRESETS[place][2]);
    label.querySelector("input").checked = !listed && steps[0] === prior && steps[1] === decoder;
    label.querySelector("small").textContent = `${prior} + ${decoder} steps`;
  });
});
