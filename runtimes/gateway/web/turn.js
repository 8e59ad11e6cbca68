// Turn latency as the page sees it: from the end of the user's voice to the first voiced output in hand.

const VOICED = 0.01; // root mean square of a piece, full scale is 1
const FORGET_MS = 5000;

const voiced = (samples) => Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / samples.length) > VOICED;

export class TurnTimer {
  constructor() {
    this.ended = null; // when the user was last heard
    this.speaking = false; // was the model, in the last output?
  }

  /** A piece of the microphone, just captured. Who is talked over gives no turn. */
  heard(samples) {
    if (voiced(samples)) this.ended = this.speaking ? null : performance.now();
  }

  /** A piece of the model's voice, just arrived. Gives the latency in milliseconds when it starts an answer. */
  said(samples) {
    const before = this.speaking;
    this.speaking = voiced(samples);
    if (!this.speaking || before || this.ended === null) return null;
    const passed = performance.now() - this.ended;
    this.ended = null;
    return passed < FORGET_MS ? passed : null;
  }
}
