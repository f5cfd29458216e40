/** The sampler of diffusers' DDPMWuerstchenScheduler in float32, and classifier-free guidance. */

const round = Math.fround;
const HALF_PI = round(round(Math.PI) * 0.5);
const OFFSET = round(0.008);
const [LEAST, MOST] = [round(0.0001), round(0.9999)]; // of the signal's share
const cosineSquared = t => { const c = round(Math.cos(round(round(round(t + OFFSET) / round(1 + OFFSET)) * HALF_PI))); return round(c * c); };
const AT_START = cosineSquared(0);

/** `steps` + 1 timestep ratios from 1 to 0, bit for bit torch.linspace(1, 0, steps + 1) in float32. */
export function timesteps(steps) {
  const step = round(-1 / steps);
  return Float32Array.from({length: steps + 1}, (_, i) =>
    i < Math.floor((steps + 1) / 2) ? step * i + 1 : -step * (steps - i));
}

/** The share of the signal's variance that is left at ratio `t`. */
const signalShare = t => Math.min(Math.max(round(cosineSquared(t) / AT_START), LEAST), MOST);

/** Latents at ratio `after`, from latents `x` at ratio `t`, the predicted noise and fresh noise. */
export function step(x, predicted, fresh, t, after) {
  const bar = signalShare(t), barAfter = signalShare(after), alpha = round(bar / barAfter);
  const rest = round(1 - alpha), deep = round(Math.sqrt(round(1 - bar))), scale = round(Math.sqrt(round(1 / alpha)));
  const variance = round(round(rest * round(1 - barAfter)) / round(1 - bar));
  const deviation = after === 0 ? 0 : round(Math.sqrt(variance)); // the last step adds no noise
  return x.map((value, i) => {
    const mean = round(scale * round(value - round(round(rest * predicted[i]) / deep)));
    return mean + round(deviation * fresh[i]);
  });
}

/** Guidance on a batch [conditional, unconditional]: half as many values come out. */
export function guided(prediction, guidance) {
  const half = prediction.length / 2, weight = round(1 - round(guidance));
  return prediction.subarray(0, half).map((conditional, i) =>
    conditional - round(round(conditional - prediction[half + i]) * weight));
}
