// Runs on the audio thread: the microphone's samples to pieces at the wire's rate, and pieces from the wire to the speaker.

const TAPS = 16; // on each side of a sample, at the lower of the two rates

/** Streaming resampler by a Hann-windowed sinc; it keeps its history, so pieces join without a seam. */
class Resampler {
  constructor(from, to) {
    this.step = from / to;
    this.cut = Math.min(1, to / from);
    this.half = Math.ceil(TAPS / this.cut);
    this.buffer = new Float32Array(this.half); // silence before the first sample
    this.at = this.half; // of the next output sample, in input samples from the start of the buffer
  }

  push(samples) {
    const joined = new Float32Array(this.buffer.length + samples.length);
    joined.set(this.buffer);
    joined.set(samples, this.buffer.length);
    const out = [];
    while (this.at + this.half < joined.length) {
      out.push(this.sample(joined, this.at));
      this.at += this.step;
    }
    const used = Math.max(0, Math.floor(this.at) - this.half);
    this.buffer = joined.slice(used);
    this.at -= used;
    return Float32Array.from(out);
  }

  sample(x, at) {
    const first = Math.ceil(at - this.half);
    const last = Math.floor(at + this.half);
    let sum = 0;
    for (let i = Math.max(first, 0); i <= last; i++) {
      const t = i - at;
      const phase = Math.PI * t * this.cut;
      const sinc = phase === 0 ? 1 : Math.sin(phase) / phase;
      sum += x[i] * sinc * (0.5 + 0.5 * Math.cos((Math.PI * t) / this.half));
    }
    return sum * this.cut;
  }
}

/** Posts Float32Array pieces of `piece` samples at `rate`. */
class Microphone extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate, piece } }) {
    super();
    this.resampler = rate === sampleRate ? null : new Resampler(sampleRate, rate);
    this.piece = new Float32Array(piece);
    this.filled = 0;
  }

  process([input]) {
    if (!input.length) return true;
    const samples = this.resampler ? this.resampler.push(input[0]) : input[0];
    for (const sample of samples) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

/** Plays what is posted; posts {played: milliseconds of the wire's audio that went to the speaker} about ten times a
 *  second. Holds `ahead` seconds back before it starts, and at most `bound` seconds; the oldest goes first. */
class Speaker extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate, ahead, bound } }) {
    super();
    this.resampler = rate === sampleRate ? null : new Resampler(rate, sampleRate);
    this.queue = [];
    this.queued = 0; // samples at the context's rate
    this.read = 0; // of the first chunk
    this.played = 0;
    this.told = 0;
    this.ahead = ahead * sampleRate;
    this.bound = bound * sampleRate;
    this.running = false;
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  receive(data) {
    if (data === "clear") {
      this.queue = [];
      this.queued = this.read = 0;
      this.running = false;
      return;
    }
    const samples = this.resampler ? this.resampler.push(data) : data;
    this.queue.push(samples);
    this.queued += samples.length;
    while (this.queued > this.bound) {
      this.queued -= this.queue.shift().length - this.read;
      this.read = 0;
    }
  }

  process(_, [output]) {
    const out = output[0];
    if (!this.running && this.queued >= this.ahead) this.running = true;
    if (!this.running) return true;
    for (let i = 0; i < out.length; i++) {
      if (!this.queue.length) {
        this.running = false; // ran dry: wait for a new head start
        break;
      }
      out[i] = this.queue[0][this.read++];
      this.queued--;
      this.played++;
      if (this.read === this.queue[0].length) {
        this.queue.shift();
        this.read = 0;
      }
    }
    if (this.played - this.told > sampleRate / 10) {
      this.told = this.played;
      this.port.postMessage({ played: (1000 * this.played) / sampleRate });
    }
    return true;
  }
}

registerProcessor("tmlc-microphone", Microphone);
registerProcessor("tmlc-speaker", Speaker);
