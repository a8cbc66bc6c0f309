// Images of loops: small ones are enlarged by whole pixels, as in the saved page.

import { h } from "./dom.js";

const SMALL = 128;

/** Returns an <img> of about `width` pixels, which is filled once the image is loaded. */
export function loopImage(api, imageId, alt, width, kind = "png") {
  const image = h("img", { alt, width, height: width, class: "loading" });
  image.addEventListener("load", () => {
    const isSmall = Math.max(image.naturalWidth, image.naturalHeight) <= SMALL;
    const factor = isSmall ? Math.max(1, Math.round(width / image.naturalWidth)) : Math.min(1, width / image.naturalWidth);
    image.width = Math.round(image.naturalWidth * factor);
    image.height = Math.round(image.naturalHeight * factor);
    image.classList.toggle("crisp", isSmall);
    image.classList.remove("loading");
  });
  api.imageUrl(imageId, kind).then((url) => { image.src = url; }, () => {
    image.replaceWith(h("span", { class: "missing" }, "The image cannot be loaded."));
  });
  return image;
}
