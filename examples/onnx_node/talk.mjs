// Drives the ONNX graphs of a package from JavaScript: appends tokens, then chooses more, and prints them as JSON.
//
//   tmlc compile nano --target onnx --folder -o nano_onnx
//   npm install --ignore-scripts --prefix examples/onnx_node
//   node examples/onnx_node/talk.mjs nano_onnx --tokens 104,105 --count 8 --temperature 0.7 --seed 3
//
// A single-file package is a zip: unpack it first. Packages with bf16 states need a driver whose tensors know bf16;
// compile with --kv fp32 for this one.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";

const ARRAYS = { f32: Float32Array, i32: Int32Array, i64: BigInt64Array, u8: Uint8Array };
const TYPES = { f32: "float32", i32: "int32", i64: "int64", u8: "uint8" };

/** One conversation: the graphs of a package folder, and the states that go from call to call. */
class Conversation {
  static async open(folder, methods) {
    const signature = JSON.parse(readFileSync(join(folder, "engines/onnx/signature.json"), "utf8"));
    const made = new Conversation();
    made.methods = signature.methods;
    made.graphs = {};
    made.states = {};
    for (const name of methods) {
      const method = signature.methods[name];
      if (method === undefined) throw new Error(`the package has no method ${name}`);
      made.graphs[name] = await ort.InferenceSession.create(join(folder, method.file));
      for (const state of method.states) {
        if (!(state.dtype in ARRAYS)) throw new Error(`state ${state.name} is ${state.dtype}: compile with --kv fp32`);
        const size = state.shape.reduce((a, b) => a * b, 1);
        made.states[state.name] = new ort.Tensor(TYPES[state.dtype], new ARRAYS[state.dtype](size), state.shape);
      }
    }
    return made;
  }

  /** Calls a method with n new positions; `given` has an array for each input. Gives back an array for each output. */
  async call(name, n, given) {
    const method = this.methods[name];
    if (n < 1 || n > method.max_n) throw new Error(`${name} takes 1 to ${method.max_n} positions a call`);
    const feeds = {};
    for (const input of method.inputs) {
      const data = ARRAYS[input.dtype].from(given[input.name]);
      if (input.below !== undefined && data.some((id) => id < 0 || id >= input.below)) {
        throw new Error(`${input.name} must be 0 to ${input.below - 1}`);
      }
      feeds[input.name] = new ort.Tensor(TYPES[input.dtype], data, [input.rows[0] * n + input.rows[1], input.cols]);
    }
    if (method.position !== null && method.position.limit) {
      const position = Number(this.states[method.position.state].data[0]);
      if (position + n > method.position.limit) throw new Error(`the context of ${method.position.limit} is full`);
    }
    for (const state of method.states) feeds[state.name] = this.states[state.name];
    const found = await this.graphs[name].run(feeds);
    for (const state of method.states) {
      if (state.next !== null) this.states[state.name] = found[state.next];
    }
    return method.outputs.map((output) => found[output.name].data);
  }

  /** Appends tokens; gives back the hidden state of the last one. */
  async append(tokens) {
    const most = Math.min(this.methods.embed_text.max_n, this.methods.decode.max_n);
    let last;
    for (let at = 0; at < tokens.length; at += most) {
      const part = tokens.slice(at, at + most);
      const [rows] = await this.call("embed_text", part.length, { [this.#only("embed_text")]: part });
      const [hidden] = await this.call("decode", part.length, { [this.#only("decode")]: rows });
      last = hidden.slice(-hidden.length / part.length);
    }
    return last;
  }

  /** The token that follows a hidden state. The key is (seed, tick, number of the output in its tick). */
  async choose(hidden, key, temperature) {
    const [x, keyName, heat] = this.methods.next_token.inputs.map((input) => input.name);
    const given = { [x]: hidden, [keyName]: key.map(BigInt), [heat]: [temperature] };
    const [ids] = await this.call("next_token", 1, given);
    return ids[0];
  }

  #only(name) {
    return this.methods[name].inputs[0].name;
  }
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: "string", default: "104,105" },
    count: { type: "string", default: "8" },
    temperature: { type: "string", default: "0" },
    seed: { type: "string", default: "0" },
  },
});
const talk = await Conversation.open(positionals[0], ["embed_text", "decode", "next_token"]);
let hidden = await talk.append(values.tokens.split(",").map(Number));
const said = [];
while (said.length < Number(values.count)) {
  said.push(await talk.choose(hidden, [Number(values.seed), 0, said.length], Number(values.temperature)));
  hidden = await talk.append(said.slice(-1));
}
console.log(JSON.stringify(said));
