// Requests to the JSON API. The session's cookie authenticates them, and unsafe ones repeat its CSRF token.

const csrfToken = document.querySelector('meta[name="csrf-token"]').content;

/** An error that the API reported. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? problem?.error?.message ?? `The service answered with status ${status}.`);
    this.status = status;
    this.code = problem?.code ?? problem?.error?.code;
  }
}

/** Send a request; return the body of the answer, parsed if it is JSON. `body` is an object or a FormData. */
export async function call(method, path, body) {
  const headers = { Accept: "application/json", "X-CSRF-Token": csrfToken };
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body === undefined || isForm ? body : JSON.stringify(body) });
  const isJson = (response.headers.get("Content-Type") ?? "").includes("json");
  const answer = isJson ? await response.json() : undefined;
  if (!response.ok) {
    if (response.status === 401) location.assign(`/console/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
    throw new ApiError(response.status, answer);
  }
  return answer;
}

/** Send a request given as `METHOD PATH`. */
export function callLine(line, body) {
  const [method, path] = line.split(" ");
  return call(method, path, body);
}
