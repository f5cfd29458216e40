/** A mask, painted over a picture. */

import {$, make} from "./dom.js";

let brushAt = null;   // where the pointer was, in pixels of the canvas
let done = null;      // takes the file of the finished mask

/** Paint on a picture. What was painted stays for as long as the picture is the same. */
export async function openPainter(item, use) {
  done = use;
  const [canvas, picture, url] = [$("canvas"), $("easel-image"), `/api/pictures/${item.id}`];
  if (picture.getAttribute("src") !== url) {
    picture.src = url;
    await picture.decode();
    canvas.width = picture.naturalWidth;
    canvas.height = picture.naturalHeight;
  }
  $("painter").showModal();
}

function paint(event) {
  const [canvas, box] = [$("canvas"), $("canvas").getBoundingClientRect()];
  const scale = canvas.width / box.width;
  const here = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const brush = canvas.getContext("2d");
  brush.globalCompositeOperation = $("erase").ariaPressed === "true" ? "destination-out" : "source-over";
  brush.strokeStyle = "#e8437f";  // seen on most pictures; the mask takes the shape alone
  brush.lineCap = brush.lineJoin = "round";
  brush.lineWidth = $("brush").value / 100 * Math.max(canvas.width, canvas.height);
  brush.beginPath();
  brush.moveTo(...(brushAt || here));
  brush.lineTo(...here);
  brush.stroke();
  brushAt = here;
}

/** White on black, as a file of a mask would be. */
async function finish() {
  const mask = make("canvas", {width: $("canvas").width, height: $("canvas").height});
  const ground = mask.getContext("2d");
  ground.drawImage($("canvas"), 0, 0);
  for (const [how, colour] of [["source-in", "white"], ["destination-over", "black"]]) {
    ground.globalCompositeOperation = how;
    ground.fillStyle = colour;
    ground.fillRect(0, 0, mask.width, mask.height);
  }
  $("painter").close();
  done(await new Promise(resolve => mask.toBlob(resolve, "image/png")));
}

$("canvas").addEventListener("pointerdown", event => { event.target.setPointerCapture(event.pointerId); paint(event); });
$("canvas").addEventListener("pointermove", event => { if (brushAt) paint(event); });
for (const kind of ["pointerup", "pointercancel"]) $("canvas").addEventListener(kind, () => { brushAt = null; });
$("erase").addEventListener("click", () => { $("erase").ariaPressed = String($("erase").ariaPressed !== "true"); });
$("clear").addEventListener("click", () => { $("canvas").width = $("canvas").width; });
$("leave").addEventListener("click", () => $("painter").close());
$("painted").addEventListener("click", finish);
