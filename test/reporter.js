import { StringDecoder } from 'node:string_decoder'
import { Transform } from 'node:stream'

const RESULT = /^( *)(not ok|ok) \d+(?: - (.*?))?(?: # time=(.*))?$/

/**
 * A reporter for tap: a line for each test file, and each failed assertion with the names of its tests and all that tap
 * says about it. It prints the same to a terminal and to a pipe, where those of tap redraw a screen.
 */
export default class Reporter extends Transform {
  #decoder = new StringDecoder()
  #rest = ''
  /** The names of the tests that are running, by their depth. */
  #names = []
  /** The depth of the failure that is being printed, and the deepest that was printed in this file. */
  #failure
  #printed = -1

  _transform (chunk, encoding, done) {
    const lines = (this.#rest + this.#decoder.write(chunk)).split('\n')
    this.#rest = lines.pop()
    for (const line of lines) this.#read(line)
    done()
  }

  _flush (done) {
    this.#read(this.#rest)
    done()
  }

  #read (line) {
    const [, indent, result, name = '', time] = RESULT.exec(line) ?? []
    const depth = line.search(/\S/) / 4
    if (this.#failure !== undefined && result === undefined) {
      if (/^ *(---|\.\.\.)$/.test(line) && depth <= this.#failure + 1) {
        if (line.endsWith('...')) this.#failure = undefined
      } else {
        this.push(`${line}\n`)
      }
    } else if (line.startsWith('# Subtest: ', depth * 4)) {
      this.#names.splice(depth, Infinity, line.slice(depth * 4 + '# Subtest: '.length))
    } else if (line.includes(' # SKIP')) {
      this.push(`skipped: ${line.trim()}\n`)
    } else if (result !== undefined) {
      this.#finish(indent.length / 4, result, name, time)
    } else if (/^(# (\{|time=|No coverage)|Bail out!|1\.\.0)/.test(line)) {
      this.push(`${line}\n`)
    }
  }

  #finish (depth, result, name, time) {
    this.#failure = undefined
    if (result === 'not ok' && !/ # TODO/.test(name)) {
      // The tests around a failed assertion fail as well.
      if (this.#printed <= depth) {
        this.push(`\nFAILED: ${[...this.#names.slice(0, depth), name].join(' > ')}\n`)
        this.#failure = depth
        this.#printed = depth
      } else {
        this.#printed = depth
      }
    }
    if (depth > 0) return
    this.push(`${result} ${name}${time === undefined ? '' : ` (${time.trim()})`}\n`)
    this.#printed = -1
  }
}
