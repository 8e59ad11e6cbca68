// The microphone and the speaker of a session, over one AudioContext; PCM16 in base64 as the wire has it.

const PIECE_SECONDS = 0.04;
const AHEAD_SECONDS = 0.06;
const BOUND_SECONDS = 4;

/** Float32Array in -1..1 to base64 of little-endian PCM16. */
export function toPcm16(samples) {
  const bytes = new Uint8Array(samples.length * 2);
  const view = new DataView(bytes.buffer);
  samples.forEach((x, i) => view.setInt16(2 * i, Math.round(Math.max(-1, Math.min(1, x)) * 32767), true));
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

/** Base64 of little-endian PCM16 to Float32Array. */
export function fromPcm16(base64) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length >> 1 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

export class Sound {
  /** Must be called from a click: browsers start audio only then. `heard(samples)` gets the microphone's pieces,
   *  `played(ms)` how much of the model's audio went to the speaker. */
  static async open(stream, rate, heard, played) {
    const context = new AudioContext();
    await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    const sound = new Sound();
    sound.context = context;
    sound.muted = false;
    const microphone = new AudioWorkletNode(context, "tmlc-microphone", {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { rate, piece: Math.round(rate * PIECE_SECONDS) },
    });
    microphone.port.onmessage = ({ data }) => heard(sound.muted ? data.fill(0) : data);
    context.createMediaStreamSource(stream).connect(microphone);
    sound.speaker = new AudioWorkletNode(context, "tmlc-speaker", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { rate, ahead: AHEAD_SECONDS, bound: BOUND_SECONDS },
    });
    sound.speaker.port.onmessage = ({ data }) => played(data.played);
    sound.speaker.connect(context.destination);
    await context.resume();
    return sound;
  }

  /** Float32Array at the wire's rate; it is handed over. */
  play(samples) {
    this.speaker.port.postMessage(samples, [samples.buffer]);
  }

  clear() {
    this.speaker.port.postMessage("clear");
  }

  async close() {
    await this.context.close();
  }
}
