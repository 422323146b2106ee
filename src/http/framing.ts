import type { IncomingMessage } from 'node:http'

/** Node keeps at most this many headers. Until the head is complete, a tiny header takes ten times its size. */
export const MAX_HEADERS = 128

/** Returns true for a request that names exactly one host and an HTTP version that the relay knows. */
export function hasOneHost ({ rawHeaders, httpVersion }: IncomingMessage): boolean {
  let hosts = 0
  for (let index = 0; index < rawHeaders.length; index += 2) {
    const name = rawHeaders[index] as string
    if (name.length === 4 && name.toLowerCase() === 'host') hosts++
  }
  return httpVersion === '1.1' ? hosts === 1 : httpVersion === '1.0' && hosts <= 1
}

/** Returns true if Node may have dropped headers of a request. */
export const hasTooManyHeaders = ({ rawHeaders }: IncomingMessage) => rawHeaders.length >= 2 * MAX_HEADERS

/** Returns true for a transfer encoding that another server could read differently. */
export function hasOtherCoding ({ headers: { 'transfer-encoding': coding }, httpVersion }: IncomingMessage): boolean {
  return coding !== undefined && (coding.toLowerCase() !== 'chunked' || httpVersion === '1.0')
}

/**
 * Returns true for a request after which two servers could disagree where the next one begins. Node reads on after
 * Upgrade, but drops the bytes behind the request that are in the same chunk.
 */
export const mustBeLast = (request: IncomingMessage): boolean =>
  'upgrade' in request.headers || hasOtherCoding(request) || !hasOneHost(request) || hasTooManyHeaders(request)
