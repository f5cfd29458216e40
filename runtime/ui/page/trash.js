/** Deletes an image after a question, into the folder "trash", and brings it back. */

import {imagesChanged, post} from "./dom.js";
import {complain, confirmed, notice} from "./messages.js";

export async function removeImage(image) {
  const text = `${image.name} is moved to the folder “trash” beside the images. You can undo it.`;
  if (!await confirmed("Delete this image?", text, "Delete", {danger: true})) return;
  complain("");
  try {
    const {restore} = await post(`${image.url.split("?")[0]}/delete`);
    imagesChanged(image);
    notice(`${image.name} was deleted.`, "Undo", () => bringBack(restore));
  } catch (error) { complain(error.message); }
}

async function bringBack(token) {
  try {
    const {name} = await post(`/api/trash/${token}/restore`);
    notice(`${name} is back.`);
    imagesChanged();
  } catch (error) { complain(error.message); }
}
