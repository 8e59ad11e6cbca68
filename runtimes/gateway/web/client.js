// One session on the Live dialect (docs/wire.md): connects, starts, resumes after a cut, and turns events into calls.

const RETRIES = 5;
const FIRST_RETRY_MS = 500;

export class LiveClient {
  /** `on` has functions: started(session), audio(base64), transcript(text), tick(event), note(text), error(text),
   *  state(name, text) with name idle, busy, live or error. */
  constructor({ model, rate, secret, on }) {
    Object.assign(this, { model, rate, secret, on });
    this.token = null;
    this.tries = 0;
    this.closing = false;
    this.ready = false;
    this.connect();
  }

  connect() {
    this.on.state("busy", this.token ? "resuming" : "connecting");
    const url = new URL("v1/live/sessions", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    if (this.token) url.searchParams.set("tmlc_resume", this.token);
    const protocols = this.secret ? ["realtime", `openai-insecure-api-key.${this.secret}`] : [];
    this.socket = new WebSocket(url, protocols);
    this.socket.onopen = () => {
      if (this.token) return; // the server speaks first when a session goes on
      const format = { type: "audio/pcm", rate: this.rate };
      this.send({ type: "session.start", session: { model: this.model, audio: { format }, tmlc: { events: true } } });
    };
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = (event) => this.closed(event);
  }

  send(event) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
  }

  hear(base64) {
    if (this.ready) this.send({ type: "session.input_audio.append", audio: base64 });
  }

  see(dataUrl) {
    if (this.ready) this.send({ type: "tmlc.input_video_frame.append", image_url: dataUrl });
  }

  type(text) {
    this.send({ type: "tmlc.input_text.append", text });
  }

  played(ms) {
    if (this.ready) this.send({ type: "tmlc.playback", played_ms: Math.round(ms) });
  }

  close() {
    this.closing = true;
    this.send({ type: "session.close" });
    setTimeout(() => this.socket.close(), 1000);
  }

  receive(event) {
    this.token = event.tmlc?.resume_token ?? this.token;
    switch (event.type) {
      case "session.started":
        this.ready = true;
        this.tries = 0;
        this.on.state("live", "live");
        this.on.started(event.session);
        break;
      case "session.output_audio.delta":
        this.on.audio(event.delta);
        break;
      case "session.output_transcript.delta":
        this.on.transcript(event.delta);
        break;
      case "tmlc.tick":
        this.on.tick(event);
        break;
      case "session.delegation.created":
        this.on.note(`delegated (${event.delegation.id})`);
        break;
      case "info":
        this.on.note(event.message);
        break;
      case "error":
        this.on.error(event.error.message);
        break;
      case "session.closed":
        this.closing = true;
        this.on.note(`session ended: ${event.reason}`);
        break;
    }
  }

  closed(event) {
    this.ready = false;
    if (this.closing) {
      this.on.state("idle", "ended");
    } else if (this.token && this.tries < RETRIES) {
      this.on.state("busy", "connection lost, trying again");
      setTimeout(() => this.connect(), FIRST_RETRY_MS * 2 ** this.tries++);
    } else {
      // A browser tells a page neither the status nor the body of a refused upgrade: ask the server why.
      this.on.state("error", event.reason || "the server refused the connection: it is full, or the key is wrong");
    }
  }
}
