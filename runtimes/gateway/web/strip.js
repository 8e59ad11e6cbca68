// The strip of ticks: one bar a tick, its lateness below its step, with the line that a step must stay under.

const SHOWN = 150; // 30 seconds
const BUDGET_MS = 160;

export class Strip {
  constructor(canvas) {
    this.canvas = canvas;
    this.ticks = [];
    this.count = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** `tick`: {step_ms, late_ms, model_speaking, missing_ms, collapsed}. */
  add(tick) {
    this.ticks.push(tick);
    this.count++;
    if (this.ticks.length > SHOWN) this.ticks.shift();
    requestAnimationFrame(() => this.draw());
  }

  /** The nearest-rank 99th percentile of the steps shown, in milliseconds. */
  p99() {
    const steps = this.ticks.map((t) => t.step_ms).sort((a, b) => a - b);
    return steps[Math.ceil(0.99 * steps.length) - 1];
  }

  draw() {
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
    if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const tallest = Math.max(BUDGET_MS * 1.25, ...this.ticks.map((t) => t.step_ms + t.late_ms));
    const y = (ms) => height - 1 - ((height - 2) * ms) / tallest;
    const slot = width / SHOWN;
    const first = SHOWN - this.ticks.length;
    this.ticks.forEach((tick, i) => {
      const x = (first + i) * slot;
      const bar = Math.max(1, slot - 1);
      pen.fillStyle = colour("late");
      pen.fillRect(x, y(tick.late_ms), bar, y(0) - y(tick.late_ms));
      pen.fillStyle = colour(tick.model_speaking ? "speech" : "step");
      pen.fillRect(x, y(tick.late_ms + tick.step_ms), bar, y(tick.late_ms) - y(tick.late_ms + tick.step_ms));
      if (tick.missing_ms || tick.collapsed) {
        pen.fillStyle = colour("missing");
        pen.fillRect(x, height - 3, bar, 3);
      }
    });
    pen.strokeStyle = colour("late");
    pen.setLineDash([4, 4]);
    pen.beginPath();
    pen.moveTo(0, y(BUDGET_MS));
    pen.lineTo(width, y(BUDGET_MS));
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = colour("soft");
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(`${BUDGET_MS} ms`, 4, y(BUDGET_MS) - 4);
  }
}
