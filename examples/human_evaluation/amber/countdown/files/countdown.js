const minutes = document.getElementById("minutes"), left = document.getElementById("left");
let seconds = 300, timer = 0;
function show() {
  left.textContent = [Math.floor(seconds / 60), seconds % 60].map((n) => String(n).padStart(2, "0")).join(":");
}
function pause() { clearInterval(timer); timer = 0; }
function reset() { pause(); seconds = 60 * Math.max(1, Number(minutes.value) || 1); show(); }
function tick() { if (seconds > 0) { seconds -= 1; show(); } else { pause(); } }
document.getElementById("start").onclick = () => { timer ||= setInterval(tick, 1000); };
document.getElementById("pause").onclick = pause;
document.getElementById("reset").onclick = reset;
minutes.onchange = reset;
