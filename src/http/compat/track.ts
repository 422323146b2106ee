import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Verdict } from '../../identity/verdict.ts'
import { isOpenLoopback } from '../../config.ts'
import type { EventKind } from '../../metrics.ts'
import { plainAddress } from '../address.ts'
import { PROBLEMS, type ProblemCode, type ProblemOptions } from '../problem.ts'
import { sendAnswer, statusOf } from './answers.ts'
import { createEventReader, locateEvents, MAX_EVENTS, type Parsed } from './events.ts'
import { mayBeForged } from './request.ts'
import type { CompatOptions } from './routes.ts'

/** The SDKs for Java and Ruby leave after 10 s. */
const ANSWER_MS = 7800

/** What is left for the outbox and the answer when Mixpanel has had its time. */
const LAST_MS = 1300

/** A request whose body took long still gets this time. */
const MIN_MS = 2000

interface Options extends Omit<CompatOptions, 'bodies' | 'logger'> {
  countIdentities: (request: FastifyRequest, amount: number) => Promise<number | undefined>
  onToken: (token: string) => void
}

/** Why a request is refused as a whole, and how many events it has as far as that is known. */
type Refusal = ProblemOptions & { code: ProblemCode, count: number }

const unreadable = (detail: string): Refusal =>
  ({ code: 'invalid_request', count: 0, errors: [{ pointer: '', detail }] })
const tooMany = (count: number, max: number): Refusal =>
  ({ code: 'body_too_large', count, detail: `data must not have more than ${max} events` })

/** What became of one event: `reason` is for the caller of one that was not taken. */
interface Outcome {
  kind: EventKind
  outcome: 'accepted' | 'queued' | 'refused' | 'failed'
  code: string
  reason?: string | undefined
  retryAfter?: number | undefined
}

/** The refusals of Mixpanel and of the merge guard, which a repeat does not change. */
const FINAL = new Set<string>(['refused_by_mixpanel', 'suspicious_identity'])

/** Returns a function that forwards the events in some data and answers for all of them. */
export function createTrack (options: Options) {
  const { relay, config, rules, nextSlice, metrics, countIdentities, onToken } = options
  const readEvent = createEventReader({ config, rules, onToken })
  const isOpen = isOpenLoopback(config)
  const maxEvents = Math.min(MAX_EVENTS, config.RATE_LIMIT_MAX, config.MAX_IN_FLIGHT)

  /** Returns the events of a request, or why it is refused as a whole. */
  async function readEvents (request: FastifyRequest, data: Buffer | undefined): Promise<Parsed[] | Refusal> {
    if (data === undefined) return unreadable('data is required')
    await nextSlice()
    const found = locateEvents(data)
    if (found === 'unreadable') return unreadable('data must be JSON, or base64 of it: an event or an array of events')
    if (found === 'too_many') return tooMany(MAX_EVENTS + 1, MAX_EVENTS)
    const count = found.length / 2
    if (count === 0) return unreadable('data must have at least one event')
    if (count > maxEvents) return tooMany(count, maxEvents)
    // The request itself counts as one already.
    const wait = count > 1 ? await countIdentities(request, count - 1) : undefined
    if (wait !== undefined) return { code: 'too_many_requests', count, retryAfter: wait }
    const ip = request.parameters?.ip === '1' ? plainAddress(request.ip) : undefined
    const events: Parsed[] = []
    for (let index = 0; index < found.length; index += 2) {
      await nextSlice()
      events.push(readEvent(request, data.subarray(found[index], found[index + 1]), ip))
    }
    if (mayBeForged(request) && events.some(({ kind }) => kind !== 'ordinary')) {
      return { code: 'forbidden', count, detail: 'A page of another site may not merge.' }
    }
    return relay.hasRoom(count) ? events : { code: 'overloaded', count, retryAfter: 1 }
  }

  function refuse (reply: FastifyReply, { code, count, ...options }: Refusal): FastifyReply {
    metrics.events('unread', 'failed', code, count)
    reply.logLine.details = { ...reply.logLine.details, events: count, refused: count }
    return reply.problem(code, options)
  }

  async function forward ({ kind, event, refusal }: Parsed, send: Send): Promise<Outcome> {
    if (event === undefined) return { kind, outcome: 'refused', code: String(refusal?.code), reason: refusal?.reason }
    const verdict = await send(event)
    const { code, retryAfter } = verdict
    if (code === 'accepted' || code === 'queued') return { kind, outcome: code, code }
    const { reason = PROBLEMS[code].detail } = verdict
    return { kind, outcome: FINAL.has(code) ? 'refused' : 'failed', code, reason, retryAfter }
  }

  return async (request: FastifyRequest, reply: FastifyReply, data: Buffer | undefined): Promise<FastifyReply> => {
    const events = await readEvents(request, data)
    if (!Array.isArray(events)) return refuse(reply, events)
    const left = Math.max(MIN_MS, ANSWER_MS - (performance.now() - request.since))
    const isTrusted = isOpen || request.caller.kind === 'key'
    const failures = new Map<string, Verdict>()
    const send: Send = event => relay.track(event, left - LAST_MS, { isTrusted, failures })
    const outcomes = await withinMs(left, events.map(one => forward(one, send).catch((error: Error): Outcome => {
      reply.logUnhandledError(error)
      return { kind: one.kind, outcome: 'failed', code: 'internal', reason: PROBLEMS.internal.detail }
    })), (index): Outcome => ({
      kind: (events[index] as Parsed).kind,
      outcome: 'failed',
      code: 'mixpanel_timed_out',
      reason: PROBLEMS.mixpanel_timed_out.detail
    }))
    for (const { kind, outcome, code } of outcomes) metrics.events(kind, outcome, code)
    return answer(reply, outcomes)
  }
}

type Send = (event: NonNullable<Parsed['event']>) => Promise<Verdict>

/** Answers for all events: a failure that a repeat may change goes before a refusal, and a success before both. */
function answer (reply: FastifyReply, outcomes: Outcome[]): FastifyReply {
  const count = outcomes.length
  const refused = outcomes.filter(({ outcome }) => outcome === 'refused')
  const failed = outcomes.filter(({ outcome }) => outcome === 'failed')
  const [first] = failed.length > 0 ? failed : refused
  reply.logLine.details = {
    ...reply.logLine.details,
    events: count,
    refused: refused.length,
    ...failed.length > 0 && { failed: failed.length },
    ...first && (failed.length > 0 || refused.length === count) && { code: first.code }
  }
  if (first === undefined) return sendAnswer(reply, 200, true, null)
  if (failed.length > 0) {
    const retryAfter = Math.max(0, ...failed.map(one => one.retryAfter ?? 0))
    if (retryAfter > 0) reply.header('retry-after', retryAfter)
    return sendAnswer(reply, statusOf(first.code as ProblemCode), false, summary(failed.length, count, 'failed', first))
  }
  return sendAnswer(reply, 200, refused.length < count, summary(refused.length, count, 'refused', first))
}

/** Returns a sentence on the events that were not taken. */
const summary = (some: number, all: number, what: string, { reason }: Outcome) =>
  all === 1 ? String(reason) : `${some} of ${all} events ${what}; the first: ${reason}`

/** Resolves with all results after at most `ms`; what is not there by then is `late`. */
async function withinMs<Result> (
  ms: number, promises: Promise<Result>[], late: (index: number) => Result
): Promise<Result[]> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<void>(resolve => { timer = setTimeout(resolve, ms) })
  const results = await Promise.all(promises.map((promise, index) =>
    Promise.race([promise, timeout.then(() => late(index))])))
  clearTimeout(timer)
  return results
}
