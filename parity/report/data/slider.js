for (const slider of document.querySelectorAll(".compare input")) {
  const frame = slider.closest(".compare");
  const move = () => frame.style.setProperty("--at", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
