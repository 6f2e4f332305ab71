// Plays a KV pool: one slider, one map, one block table.
each('player', (root, data) => {
  const [status, detail] = root.querySelectorAll('[role=status]'), select = root.querySelector('select[data-request]');
  const last = data.steps.length - 1;
  let chosen = -1, map = null;
  const show = (step) => {
    map.draw(step, chosen);
    status.textContent = `${data.policy}: step ${step + 1} of ${last + 1}, ${data.notes[step]}`;
    detail.textContent = map.said(chosen);
    root.dataset.step = step;
  };
  const player = controls(root, show);
  const choose = (request) => { chosen = request; select.value = request; show(player.value()); };
  select.addEventListener('change', () => choose(Number(select.value)));
  paintKeys(root, data.looks);
  follow(root, 1100, (width) => {
    map = poolMap(root.querySelector('canvas[data-pool]'), data, width, choose);
    show(player.value());
  });
});
