/** Answers of the server. */

/** Ask for JSON.
 *
 * @throws {Error} with the server's sentence, and `fromServer`, where it refused
 */
export async function getJson(address) {
  const answer = await fetch(address, { headers: { Accept: "application/json" } });
  let body;
  try {
    body = await answer.json();
  } catch {
    throw new Error(`the server answered ${answer.status} without JSON`);
  }
  if (!answer.ok) {
    const error = new Error(body.error ?? `the server answered ${answer.status}`);
    error.fromServer = true;
    throw error;
  }
  return body;
}
