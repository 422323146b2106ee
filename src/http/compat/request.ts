import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Lease } from '../body.ts'
import { withQuery } from './answers.ts'
import { queryOf, readBody, readForm, type Form } from './form.ts'
import { gunzip } from './gunzip.ts'

/**
 * Resolves with the data of a request, and records what it asks for. The body is released. Rejects with a BodyError if
 * it is packed and cannot be unpacked.
 */
export async function readRequest (
  request: FastifyRequest, reply: FastifyReply, limit: number
): Promise<Buffer | undefined> {
  const query = readForm(queryOf(request.raw.url as string))
  const body = request.body as Buffer | undefined
  request.body = undefined
  // Until the body is unpacked only the query tells in which form an error is answered.
  request.parameters = query
  const isPacked = request.headers['content-encoding']?.toLowerCase() === 'gzip'
  const unpack = (packed: Buffer) => gunzip(packed, limit, request.raw.lease as Lease)
  const form: Form = body === undefined ? {} : readBody(isPacked ? await unpack(body) : body)
  const { data = query.data, ...parameters } = form
  request.parameters = withQuery(reply, parameters)
  return data
}

/** Returns true for a request of a page of another site, as its browser says, that does not name the origin. */
export function isFromOtherSite ({ headers: { origin, 'sec-fetch-site': site } }: FastifyRequest): boolean {
  return origin === undefined && (site === 'cross-site' || site === 'same-site')
}

/** Returns true for a request that a page can have made without naming its origin, or that is a click on a link. */
export const mayBeForged = (request: FastifyRequest): boolean =>
  isFromOtherSite(request) || (request.method === 'GET' && request.headers['sec-fetch-mode'] === 'navigate')
