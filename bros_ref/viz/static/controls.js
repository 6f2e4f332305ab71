// A slider, play, and steps a second: what every player has. `show` is called with the slider's value, at most once a
// frame; what it draws needs no kernel.
function controls(root, show) {
  root.dataset.ready = 'yes';
  const [slider, button] = [root.querySelector('input[type=range]'), root.querySelector('button[data-play]')];
  const speed = root.querySelector('select[data-speed]');
  let queued = false, timer = null;
  const update = () => {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; show(Number(slider.value)); });
  };
  const go = (value) => { slider.value = value; update(); };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = 'play'; };
  const advance = () => {
    if (Number(slider.value) >= Number(slider.max)) stop();
    else go(Number(slider.value) + 1);
  };
  const start = () => {
    button.textContent = 'pause';
    timer = setInterval(advance, 1000 / Number(speed.value));
  };
  slider.addEventListener('input', update);
  button.addEventListener('click', () => {
    if (timer !== null) { stop(); return; }
    if (Number(slider.value) >= Number(slider.max)) go(0);
    start();
  });
  speed.addEventListener('change', () => { if (timer !== null) { clearInterval(timer); start(); } });
  slider.style.maxWidth = 'calc(100% - 8px)'; // its margins
  return { go, value: () => Number(slider.value), update, limit: (last) => { slider.max = last; } };
}

// Calls `lay` with the width that there is for a widget, now and whenever it changes; at most `most` pixels.
function follow(root, most, lay) {
  let width = 0;
  const look = () => {
    const now = Math.min(most, root.clientWidth || most);
    if (now !== width) { width = now; lay(width); }
  };
  look();
  new ResizeObserver(look).observe(root);
}

// Round numbers from 0 up to `top`, at most about `count` of them, for the ticks of an axis.
function ticks(top, count) {
  const rough = top / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough), found = [];
  for (let i = 0; i * step <= top * 1.0001; i++) found.push(Number((i * step).toPrecision(6)));
  return found;
}

// Every widget of a kind that has not been started; a page may hold many, and each carries this script.
function each(kind, start) {
  for (const root of document.querySelectorAll(`[data-bros-${kind}]:not([data-ready])`)) {
    start(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent));
  }
}

// A canvas of `width` x `height` CSS pixels, sharp on a dense screen.
function sized(canvas, width, height) {
  const ratio = Math.min(2, Math.max(1, window.devicePixelRatio || 1)), ctx = canvas.getContext('2d');
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  return ctx;
}

// Where in a canvas an event is, in the pixels it was drawn in.
function within(canvas, event) {
  const box = canvas.getBoundingClientRect(), wide = parseFloat(canvas.style.width);
  return [(event.clientX - box.left) * wide / box.width, (event.clientY - box.top) * wide / box.width];
}

// A fill: a colour, with marks that tell it apart without colour.
const MARKS = {
  '/': [[-1, 7, 7, -1]], '\\': [[-1, -1, 7, 7]], x: [[1, 1, 5, 5], [5, 1, 1, 5]], '|': [[3, 0, 3, 6]],
  '-': [[0, 3, 6, 3]], '.': [[2, 3, 4, 3]], '+': [[3, 1, 3, 5], [1, 3, 5, 3]], _: [[0, 5, 6, 5]],
};
function hatch(ctx, [colour, mark, stroke]) {
  if (!mark) return colour;
  const tile = document.createElement('canvas'), pen = tile.getContext('2d');
  tile.width = tile.height = 6;
  pen.fillStyle = colour; pen.fillRect(0, 0, 6, 6);
  pen.strokeStyle = stroke; pen.lineWidth = mark === '.' ? 2 : 1.2; pen.beginPath();
  for (const [x, y, u, v] of MARKS[mark]) { pen.moveTo(x, y); pen.lineTo(u, v); }
  pen.stroke();
  return ctx.createPattern(tile, 'repeat');
}

// The samples of a legend, painted with the fills that the drawing uses; "_" is a bar along the bottom.
function paintKeys(root, looks) {
  for (const key of root.querySelectorAll('canvas[data-key]')) {
    const ctx = sized(key, 26, 12), kinds = key.dataset.key.split(' '), wide = 26 / kinds.length; // one part for each
    kinds.forEach((kind, part) => {
      const [colour, mark, stroke] = looks[kind], bar = mark === '_';
      ctx.fillStyle = bar ? colour : hatch(ctx, [colour, mark, stroke]); ctx.fillRect(part * wide, 0, wide, 12);
      if (bar) { ctx.fillStyle = stroke; ctx.fillRect(part * wide, 9, wide, 3); }
    });
    ctx.strokeStyle = '#66717f'; ctx.lineWidth = 1; ctx.strokeRect(0.5, 0.5, 25, 11);
  }
}
