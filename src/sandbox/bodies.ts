import type { FastifyRequest } from 'fastify'
import type { Params } from './endpoints.ts'

/** Returns the parameters and the data of a request to `/track`: null if it is not JSON, undefined if it is missing. */
export function readTrack (request: Pick<FastifyRequest, 'query' | 'headers' | 'body'>) {
  const body = String(request.body ?? '')
  const query = request.query as Params
  const isJson = request.headers['content-type']?.startsWith('application/json') === true
  if (isJson) return { params: query, data: parse(body) }
  const params: Params = { ...query, ...Object.fromEntries(new URLSearchParams(body)) }
  return { params, data: params.data ? parseData(params.data) : undefined }
}

/** Parses the body of `/import`: an array, or one event per line. */
export function readImport ({ body }: Pick<FastifyRequest, 'body'>): unknown {
  const text = String(body)
  return /^\s*\[/.test(text) ? parse(text) : text.trim().split('\n').map(parse)
}

/** Returns the value of a JSON text, or null. */
export function parse (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}

/** Parses plain JSON, or base64 in which a form parser may have turned `+` into a space. */
function parseData (data: string): unknown {
  return parse(/^\s*[[{]/.test(data) ? data : Buffer.from(data.replaceAll(' ', '+'), 'base64').toString())
}
