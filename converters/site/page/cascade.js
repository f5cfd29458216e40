/** The cascade: prompt -> embeddings -> prior latents -> decoder latents -> pixels, one image at a time. */

import {Generator} from "./noise.js";
import {guided, step, timesteps} from "./sampler.js";
import {LENGTH} from "./tokenizer.js";

const PRIOR_COMPRESSION = 42.67, VQGAN_COMPRESSION = 4;

export class Cascade {
  constructor(networks, tokenizer) {
    this.networks = networks;
    this.tokenizer = tokenizer;
  }

  /** An image as {width, height, pixels, left}: RGBA bytes, and how many tokens of the prompt did not fit.
   *
   * `settings` are {prompt, negative, width, height, seed, prior: {steps, guidance}, decoder: {steps, guidance}}.
   * `onStep(stage, index, steps)` is awaited after each step; an exception there cancels. */
  async generate(settings, onStep = async () => {}) {
    const {width, height, seed} = settings, {networks} = this;
    const generator = new Generator(seed);
    const texts = await this.#encode([settings.prompt, settings.negative]);
    const size = [height, width].map(side => Math.ceil(side / PRIOR_COMPRESSION));
    const channels = networks.size("prior", "clip_img", 2);
    const zeros = [new Float32Array(channels), new Float32Array(channels)];
    const conditions = {clip_text: texts.hidden, clip_text_pooled: texts.pooled, clip_img: {rows: zeros, dims: [1, channels]}};
    const prior = await this.#sample("prior", {conditions, size, generator, onStep, ...settings.prior});
    const latents = [networks.size("prior", "sample", 1), ...size];
    const effnet = {rows: [prior, new Float32Array(prior.length)], dims: latents};
    const decoder = await this.#sample("decoder", {
      conditions: {clip_text_pooled: texts.pooled, effnet},
      size: [height, width].map(side => Math.ceil(side / VQGAN_COMPRESSION)),
      generator, onStep, ...settings.decoder,
    });
    return {width, height, pixels: await this.#pixels(decoder, height, width), left: texts.left};
  }

  /** The embeddings of the prompt and of the negative prompt, one row each. */
  async #encode(prompts) {
    const encoded = prompts.map(prompt => this.tokenizer.encode(prompt));
    const dims = [prompts.length, LENGTH];
    const {prompt_embeds, pooled} = await this.networks.run("text_encoder", {
      input_ids: [joined(encoded.map(({input_ids}) => input_ids)), dims],
      attention_mask: [joined(encoded.map(({attention_mask}) => attention_mask)), dims],
    });
    await this.networks.leave("text_encoder");
    return {
      hidden: rowsOf(prompt_embeds, prompts.length, LENGTH),
      pooled: rowsOf(pooled, prompts.length, 1),
      left: encoded[0].left,
    };
  }

  /** The latents of one stage. `conditions` have a row for the prompt and one for the negative prompt. */
  async #sample(stage, {conditions, size, generator, steps, guidance, onStep}) {
    const dims = [this.networks.size(stage, "sample", 1), ...size], count = dims.reduce((a, b) => a * b);
    const guides = guidance > 1, batch = guides ? 2 : 1;
    const bound = Object.fromEntries(Object.entries(conditions).map(([port, {rows, dims: shape}]) =>
      [port, [joined(rows.slice(0, batch)), [batch, ...shape]]]));
    const ratios = timesteps(steps);
    let latents = generator.normal(count);
    for (let index = 0; index < steps; index++) {
      const sample = [joined(Array(batch).fill(latents)), [batch, ...dims]];
      const timestep_ratio = [new Float32Array(batch).fill(ratios[index]), [batch]];
      const {noise_pred} = await this.networks.run(stage, {sample, timestep_ratio, ...bound});
      const predicted = guides ? guided(noise_pred, guidance) : noise_pred;
      if (!predicted.every(Number.isFinite)) throw new Error(`The ${stage} gave NaN or infinity in step ${index + 1}.`);
      // The last step draws noise too, as in diffusers; the next stage goes on with the generator.
      latents = step(latents, predicted, generator.normal(count), ratios[index], ratios[index + 1]);
      await onStep(stage, index, steps);
    }
    await this.networks.leave(stage);
    return latents;
  }

  async #pixels(latents, height, width) {
    const dims = [1, this.networks.size("vqgan", "latents", 1), height / VQGAN_COMPRESSION, width / VQGAN_COMPRESSION];
    const {images} = await this.networks.run("vqgan", {latents: [latents, dims]});
    await this.networks.leave("vqgan");
    const area = height * width, pixels = new Uint8ClampedArray(4 * area).fill(255);
    for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) pixels[4 * i + c] = Math.fround(images[c * area + i] * 255);
    return pixels;
  }
}

function joined(arrays) {
  const all = new arrays[0].constructor(arrays.length * arrays[0].length);
  arrays.forEach((array, i) => all.set(array, i * array.length));
  return all;
}

/** An output (batch, tokens, channels) as its rows, and the dims of one row. */
function rowsOf(data, batch, tokens) {
  const length = data.length / batch;
  const rows = Array.from({length: batch}, (_, i) => data.slice(i * length, (i + 1) * length));
  return {rows, dims: [tokens, length / tokens]};
}
