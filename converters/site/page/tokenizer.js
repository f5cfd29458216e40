/** CLIP's byte-pair tokenizer, from the bundle's tokenizer.json: the ids of transformers' CLIPTokenizer. */

export const LENGTH = 77; // positions of the text encoder
const START = 49406, END = 49407;
const SPECIAL = /<\|startoftext\|>|<\|endoftext\|>/g;
// The first pattern is CLIP's, the second that of byte-level encodings; the second cuts what the first has found.
const PIECES = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\p{White_Space}\p{L}\p{N}]+/gu;

export class Tokenizer {
  constructor({model: {vocab, merges}}) {
    this.ids = vocab;
    this.ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.bytes = byteLetters();
  }

  /** `input_ids` and `attention_mask` of a prompt, and the number of its tokens that did not fit. */
  encode(text) {
    const all = this.split(text), ids = all.slice(0, LENGTH - 2);
    const input_ids = new BigInt64Array(LENGTH).fill(BigInt(END)), attention_mask = new BigInt64Array(LENGTH);
    input_ids.set([START, ...ids].map(BigInt));
    attention_mask.fill(1n, 0, ids.length + 2);
    return {input_ids, attention_mask, left: all.length - ids.length};
  }

  /** All token ids of a prompt, without the opening and the closing one. */
  split(text) {
    const ids = [];
    let at = 0;
    for (const found of text.matchAll(SPECIAL)) {
      ids.push(...this.#plain(text.slice(at, found.index)), this.ids[found[0]]);
      at = found.index + found[0].length;
    }
    return [...ids, ...this.#plain(text.slice(at))];
  }

  #plain(text) {
    // Letters are lowered one by one: a whole word would get another sigma at its end.
    const lower = Array.from(text.normalize("NFC"), letter => letter.toLowerCase()).join("");
    const words = (lower.match(PIECES) ?? []).flatMap(piece => piece.match(PARTS) ?? []);
    return words.flatMap(word => this.#merged(word).map(part => this.ids[part]));
  }

  /** The tokens of one word: neighbours are merged, the most frequent pair first. */
  #merged(word) {
    const parts = Array.from(new TextEncoder().encode(word), byte => this.bytes[byte]);
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      let best = Infinity, place = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, place] = [rank, i];
      }
      if (place < 0) break;
      parts.splice(place, 2, parts[place] + parts[place + 1]);
    }
    return parts;
  }
}

/** A printable letter for each byte, as GPT-2 has them: bytes that print stand for themselves. */
function byteLetters() {
  const prints = byte => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({length: 256}, (_, byte) => String.fromCodePoint(prints(byte) ? byte : next++));
}
