// Plays a KV pool: one slider, one map, one block table.
each('player', (root, data) => {
  const [status, detail] = root.querySelectorAll('[role=status]'), select = root.querySelector('select[data-request]');
  const last = data.steps.length - 1;
  let chosen = -1;
  const show = (step) => {
    map.draw(step, chosen);
    status.textContent = `step ${step + 1} of ${last + 1}, ${data.notes[step]}`;
    detail.textContent = map.said(chosen);
    root.dataset.step = step;
  };
  const player = controls(root, show);
  const choose = (request) => { chosen = request; select.value = request; show(player.value()); };
  const map = poolMap(root.querySelector('canvas[data-pool]'), data, 760, choose);
  select.addEventListener('change', () => choose(Number(select.value)));
  paintKeys(root, data.looks);
  show(player.value());
});
