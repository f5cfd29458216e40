/** torch's CPU generator: the noise of `torch.randn` in float32, bit for bit, from 16 values on.
 *
 * The steps are those of cascadekit's runtime/sampling/torch_generator.py, which explains them. */

const round = Math.fround;
const BLOCK = 16;       // values of one vector step: 8 that give the radius, 8 that give the angle
const LANES = BLOCK / 2;
const STATE = 624, MIDDLE = 397; // words of the Mersenne Twister

const LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
  2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1].map(round);
const SIN = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1].map(round);
const COS = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2].map(round);
const SQRT_HALF = round(Math.SQRT1_2), FOUR_OVER_PI = round(4 / Math.PI), TWO_PI = round(2 * Math.PI);
const LN2_LOW = round(-2.12194440e-4), LN2_HIGH = round(0.693359375);
const MINUS_QUARTER_PI = [-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8].map(round);

export class Generator {
  /** `seed` is an integer from 0 to 2**32 - 1. */
  constructor(seed) {
    this.state = new Uint32Array(STATE);
    this.state[0] = seed;
    for (let i = 1; i < STATE; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = STATE;
  }

  /** `count` standard normal values as a Float32Array; `count` is at least 16. */
  normal(count) {
    const values = this.#uniform(count);
    const rest = count % BLOCK;
    boxMuller(values.subarray(0, count - rest));
    if (rest) { // torch overwrites the last 16 values with new ones
      values.set(this.#uniform(BLOCK), count - BLOCK);
      boxMuller(values.subarray(count - BLOCK));
    }
    return values;
  }

  /** The lower 24 bits of one word for each value, in [0, 1). */
  #uniform(count) {
    return Float32Array.from({length: count}, () => (this.#word() & 0xffffff) * 2 ** -24);
  }

  #word() {
    if (this.next === STATE) this.#twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return y ^ (y >>> 18);
  }

  #twist() {
    const state = this.state;
    for (let i = 0; i < STATE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % STATE] & 0x7fffffff);
      state[i] = state[(i + MIDDLE) % STATE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

/** Turn uniforms into normals in place. In a block, value i < 8 sets the radius of a pair and value i + 8 its angle. */
function boxMuller(values) {
  for (let start = 0; start < values.length; start += BLOCK) {
    for (let i = start; i < start + LANES; i++) {
      const radius = round(Math.sqrt(round(-2 * log(round(1 - values[i])))));
      const [sine, cosine] = sineAndCosine(round(TWO_PI * values[i + LANES]));
      values[i] = radius * cosine + 0; // adding 0 turns -0 into +0
      values[i + LANES] = radius * sine + 0;
    }
  }
}

/** float32 a * b + c with one rounding: the product of two float32 numbers is exact in a double. */
const fused = (a, b, c) => round(a * b + c);

/** The logarithm of `x` in [2**-24, 1], as torch's vector code computes it. */
function log(x) {
  let exponent = Math.ceil(Math.log2(x));
  let mantissa = x * 2 ** -exponent;
  if (mantissa >= 1) { mantissa /= 2; exponent++; } // the mantissa is in [0.5, 1)
  if (mantissa < 0.5) { mantissa *= 2; exponent--; }
  if (mantissa < SQRT_HALF) { mantissa *= 2; exponent--; }
  const m = mantissa - 1, square = round(m * m);
  let y = LOG.reduce((sum, coefficient) => fused(sum, m, coefficient));
  y = fused(round(y * m), square, round(exponent * LN2_LOW));
  y = fused(-0.5, square, y);
  return fused(LN2_HIGH, exponent, round(m + y));
}

/** Sine and cosine of `angle` in [0, 2 pi], as torch's vector code computes them. */
function sineAndCosine(angle) {
  const octant = (Math.trunc(round(angle * FOUR_OVER_PI)) + 1) & ~1;
  const x = MINUS_QUARTER_PI.reduce((sum, part) => fused(part, octant, sum), angle);
  const square = round(x * x);
  const even = COS.reduce((sum, coefficient) => fused(sum, square, coefficient));
  const cosine = round(fused(round(even * square), square, -0.5 * square) + 1);
  const odd = SIN.reduce((sum, coefficient) => fused(sum, square, coefficient));
  const sine = fused(round(odd * square), x, x);
  const [s, c] = octant & 2 ? [cosine, sine] : [sine, cosine];
  return [octant & 4 ? -s : s, (octant - 2) & 4 ? c : -c];
}
