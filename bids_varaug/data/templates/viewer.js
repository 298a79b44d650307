// One viewer, that moves to the scan that is looked at; NiiVue and the volumes are unpacked when they are first needed.
const viewer = (() => {
  const byId = (id) => document.getElementById(id);
  const root = byId("viewer"), canvas = byId("viewer-canvas"), scans = JSON.parse(byId("viewer-scans").textContent);
  const slots = Array.from(document.querySelectorAll(".slot"));
  const state = { nv: null, scan: 0, volumes: {}, images: {}, names: [], chosen: 0, opening: Promise.resolve(), from: null };
  const bytes = (id) => Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  const unpack = async (id) => new Response(
    new Blob([bytes(id)]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();

  const start = async () => {
    const program = document.createElement("script");
    program.textContent = new TextDecoder().decode(await unpack("viewer-program"));
    document.head.append(program);
    const nv = new niivue.Niivue({
      logLevel: "error", loadingText: "", backColor: [0, 0, 0, 1], crosshairColor: [1, 0.82, 0.3, 0.9], crosshairWidth: 0.6,
      crosshairGap: 5, fontColor: [1, 0.82, 0.3, 1], dragAndDropEnabled: false, scrollRequiresFocus: true,
      multiplanarShowRender: niivue.SHOW_RENDER.NEVER, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
      isCornerOrientationText: true, isForceMouseClickToVoxelCenters: true, doubleTouchTimeout: 250,
    });
    nv.onLocationChange = describe;
    await nv.attachToCanvas(canvas);
    state.nv = nv;
  };

  const describe = ({ mm }) => {
    const at = { x: mm[0], y: mm[1], z: mm[2] };
    const place = Object.entries(at).map(([axis, value]) => `${axis} ${value.toFixed(0).replace("-", "−")}`).join(", ");
    const labels = state.volumes.labels, parts = [`${place} mm`], value = (volume) => volume.getValue(...volume.mm2vox(mm));
    if (labels) parts.push(state.names[value(labels) - 1] || "no structure");
    for (const map of scans[state.scan - 1].maps)
      parts.push(`${map.title.toLowerCase()} ${value(state.volumes[map.name]).toFixed(map.digits)} ${map.unit}`.trim());
    if (state.volumes.unreliable && value(state.volumes.unreliable) > 0) parts.push("unreliable");
    byId("viewer-place").textContent = parts.join(" · ");
  };

  const colormap = (colors) => ({
    R: colors.map((c) => c[0]), G: colors.map((c) => c[1]), B: colors.map((c) => c[2]), A: colors.map((c) => c[3]),
    I: colors.map((_, n) => Math.round((255 * n) / (colors.length - 1))),
  });

  const show = async (scan) => {
    const { nv } = state, about = scans[scan - 1], { maps } = about;
    const load = async (name, map = "gray", low = NaN, high = NaN) => {
      if (!byId(`scan-${scan}-${name}`)) return null;
      return niivue.NVImage.new(await unpack(`scan-${scan}-${name}`), `${name}.nii`, map, 1, null, low, high);
    };
    nv.addColormap("unreliable", colormap(about.unreliable));
    const volumes = { t1w: await load("t1w", "gray", 0, 255), labels: await load("labels") };
    for (const { name, colors, low, high } of maps) {
      nv.addColormap(name, colormap(colors));
      volumes[name] = await load(name, name, low, high);
    }
    volumes.unreliable = await load("unreliable", "unreliable", 0, 1);
    const baseline = await load("baseline");
    const [R, G, B] = [0, 1, 2].map((channel) => [0, ...about.colors.map((color) => color[channel])]);
    volumes.labels.setColormapLabel({ R, G, B, labels: ["", ...about.names] });
    volumes.labels.hdr.intent_code = 1002;  // NIfTI's for labels, by which NiiVue knows them
    Object.assign(state, { scan, volumes, names: about.names });
    state.images = { labels: volumes.labels.img, baseline: baseline && baseline.img };
    // What addVolume does, but all at once: each call would draw all of them.
    nv.volumes = Object.values(volumes).filter(Boolean);
    [nv.back, ...nv.overlays] = nv.volumes;
    nv.refreshLayers(nv.back, 0);
    state.chosen = 0;
    byId("which").hidden = !baseline;
    byId("map").replaceChildren(...maps.map((map, n) => new Option(map.title, n)));
    byId("map").hidden = maps.length < 2;
    byId("map-title").textContent = maps.length === 1 ? maps[0].title : "Map";
    byId("layer-map").closest("span").hidden = !maps.length;
    byId("layer-unreliable").closest("span").hidden = !volumes.unreliable;
    layers();
    reset();
  };

  const layers = () => {
    const { nv, volumes } = state;
    if (!nv || !volumes.labels) return;
    const strength = (name) => (byId(`layer-${name}`).checked ? byId(`opacity-${name}`).value / 100 : 0);
    const filled = byId("filled").checked;
    // NiiVue draws outlines at an opacity of their own, and what is highlighted filled if the rest is nearly clear.
    volumes.labels.opacity = strength("labels") && (filled ? strength("labels") / 2 : 0.001);
    nv.opts.atlasOutline = filled ? 0 : strength("labels");
    nv.opts.atlasActiveIndex = strength("labels") && state.chosen;
    volumes.labels.img = state.images[document.querySelector("[name=which]:checked").value] || state.images.labels;
    if (volumes.unreliable) volumes.unreliable.opacity = strength("unreliable");
    const { maps } = scans[state.scan - 1], map = maps[byId("map").value], bar = byId("viewer-bar");
    for (const each of maps) volumes[each.name].opacity = each === map ? strength("map") : 0;
    bar.hidden = !map || !byId("layer-map").checked;
    if (map) {
      bar.firstElementChild.textContent = `${map.low} ${map.unit}`;
      bar.lastElementChild.textContent = `${map.high} ${map.unit} or more`;
      const colors = map.colors.map((color) => `rgb(${color.slice(0, 3)})`);
      bar.children[1].style.background = `linear-gradient(to right, ${colors})`;
    }
    nv.overlays.forEach((volume, n) => nv.refreshLayers(volume, n + 1));
    nv.drawScene();
    nv.createOnLocationChange();
  };

  const go = (mm, index = 0) => {
    const { nv } = state;
    nv.scene.crosshairPos = nv.mm2frac(mm, 0, true);
    const another = state.chosen !== index;
    state.chosen = index;
    if (another) layers();
    nv.createOnLocationChange();
    nv.drawScene();
  };

  const reset = () => {
    state.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    byId("planes").value = "3";
    state.nv.setSliceType(3);
    const { nv } = state, middle = nv.vox2frac(nv.frac2vox([0.5, 0.5, 0.5]));  // of a voxel
    go(nv.frac2mm(middle, 0, true).slice(0, 3));
  };

  const open = (scan) => {
    state.opening = state.opening.then(async () => {
      if (state.scan === scan) return;
      const slot = slots.find((each) => Number(each.dataset.scan) === scan);
      slots.filter((each) => each !== slot).forEach((each) => offer(each));
      slot.replaceChildren(root);
      root.hidden = false;
      byId("viewer-wait").hidden = false;
      if (!state.nv) await start();
      await show(scan);
      byId("viewer-wait").hidden = true;
      root.dataset.scan = scan;
    });
    state.opening.catch((error) => {
      console.error(error);
      root.hidden = true;
      slots.forEach((slot) => slot.append(Object.assign(document.createElement("p"), {
        textContent: "The viewer could not start. The figures below show the same in slices." })));
    });
    return state.opening;
  };

  const offer = (slot) => slot.replaceChildren(button("Open the viewer for this image", () => open(Number(slot.dataset.scan))));

  const follow = async (link) => {
    const slot = byId(link.getAttribute("href").slice(1));
    await open(Number(slot.dataset.scan));
    go(link.dataset.at.split(" ").map(Number), scans[state.scan - 1].indices.indexOf(Number(link.dataset.index)) + 1);
    slot.scrollIntoView({ block: "nearest" });
    state.from = link;
    byId("viewer-back").hidden = false;
    canvas.focus({ preventScroll: true });
  };

  const flicker = byId("flicker");
  const swap = () => {
    const other = Array.from(document.querySelectorAll("[name=which]")).find((radio) => !radio.checked);
    other.checked = true;
    layers();
  };
  let timer = 0;
  flicker.addEventListener("click", () => {
    clearInterval(timer);
    const on = flicker.getAttribute("aria-pressed") !== "true";
    flicker.setAttribute("aria-pressed", on);
    if (on) timer = setInterval(swap, 600);  // slower than what harms
  });
  const press = (id) => byId(id).click();
  const keys = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1],
    1: () => press("layer-labels"), 2: () => press("layer-map"), 3: () => press("layer-unreliable"),
    f: () => state.images.baseline && press("flicker"), Escape: () => go(state.nv.frac2mm(state.nv.scene.crosshairPos, 0, true), 0),
  };
  canvas.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || !state.scan || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (Array.isArray(act)) state.nv.moveCrosshairInVox(...act); else act();
  }, true);
  root.querySelectorAll("input, #map").forEach((input) => input.addEventListener("input", layers));
  byId("planes").addEventListener("change", (event) => {
    const all = event.target.value === "3";
    state.nv.setSliceType(all ? niivue.SLICE_TYPE.MULTIPLANAR : Number(event.target.value));
  });
  byId("viewer-reset").addEventListener("click", reset);
  byId("viewer-back").addEventListener("click", () => {
    state.from.scrollIntoView({ block: "center" });
    state.from.focus({ preventScroll: true });
  });

  const able = document.createElement("canvas").getContext("webgl2") && "DecompressionStream" in window;
  if (!able) {
    for (const slot of slots) slot.firstElementChild.textContent =
      "This browser cannot show the viewer (it lacks WebGL 2). The figures below show the same in slices.";
    document.querySelectorAll("a[data-at]").forEach((link) => link.replaceWith(...link.childNodes));
    return null;
  }
  slots.forEach(offer);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-at]") || (!event.target.closest("a, button") &&
      event.target.closest("tr")?.querySelector("a[data-at]"));
    if (link) {
      event.preventDefault();
      follow(link);
    }
  });
  // The first image's viewer opens by itself when it is seen.
  new IntersectionObserver((seen, observer) => {
    if (seen.some((entry) => entry.isIntersecting)) {
      observer.disconnect();
      if (!state.scan) open(Number(slots[0].dataset.scan));
    }
  }).observe(slots[0]);
  return { state, open, go };
})();
